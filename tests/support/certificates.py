"""A certificate authority of a test's own, and certificates for services on this machine. Needs `openssl`."""

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    """Files in PEM."""

    cert: Path
    key: Path

    def flags(self, ca: Path) -> list[str]:
        """Those of a service."""
        return ["--tls-cert", str(self.cert), "--tls-key", str(self.key), "--tls-ca", str(ca)]


class Authority:
    """Signs certificates, in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.cert = folder / "ca.pem"
        self._key = folder / "ca.key"
        self._openssl(
            "req", "-x509", *_NEW_KEY, "-keyout", self._key, "-out", self.cert, "-subj", "/CN=test CA"
        )

    def issue(self, name: str) -> Certificate:
        """A certificate for `name`, which is good for 127.0.0.1 and localhost too."""
        made = Certificate(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        signing = ("-CA", self.cert, "-CAkey", self._key, "-days", "1")
        names = f"subjectAltName=DNS:{name},DNS:localhost,IP:127.0.0.1"
        files = ("-keyout", made.key, "-out", made.cert)
        self._openssl("req", "-x509", *_NEW_KEY, *files, "-subj", f"/CN={name}", "-addext", names, *signing)
        return made

    def _openssl(self, *arguments: str | Path) -> None:
        done = subprocess.run(
            ["openssl", *arguments], capture_output=True, text=True, check=False, timeout=30
        )
        assert done.returncode == 0, done.stderr


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
