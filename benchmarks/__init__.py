"""Mohs beside the public libraries, on the same nets and images, in one process."""
