"""``python -m mohs``: the command line, for where the command ``mohs`` is not on the path."""

from mohs.cli import main

if __name__ == "__main__":
    main()
