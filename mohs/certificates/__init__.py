"""Certificates: proofs that no allowed change alters an answer. One file per method; ``run`` holds the verb."""

from __future__ import annotations

from mohs.certificates.crown import CROWN
from mohs.certificates.ibp import IBP
from mohs.certificates.run import Certificate, Method, certify

__all__ = ["CROWN", "IBP", "Certificate", "Method", "certify"]
