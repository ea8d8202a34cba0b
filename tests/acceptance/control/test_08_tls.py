"""The whole of a deployment under mTLS and tokens: every service, `sps2 up` itself, the SDK and the CLI."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from sps2_client import TLS, Client, ConnectionFailed, Unauthenticated
from support.certificates import Authority
from support.deployment import SPS2, deployment
from support.must_show import MustShow

pytestmark = pytest.mark.acceptance


def test_everything_is_secured(must_show: MustShow, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "certificates")
    made = authority.issue("sps2")
    tokens = tmp_path / "tokens"
    tokens.write_text(f"ops {hashlib.sha256(b'a-token').hexdigest()} operator\n")
    secured = {
        "SPS2_TLS_CERT": str(made.cert),
        "SPS2_TLS_KEY": str(made.key),
        "SPS2_TLS_CA": str(authority.cert),
        "SPS2_AUTH_TOKENS": str(tokens),
        "SPS2_TOKEN": "a-token",
    }
    with must_show("8 TLS and tokens") as figures, deployment(env=secured) as running:
        tls = TLS(authority.cert, made.cert, made.key)
        with Client(running.address, tls=tls, token="a-token") as client:
            expected = client.generate("Once upon a time", max_tokens=8)
            leaders = [one.grpc_address for one in client.cluster_state().workers]
        with Client(running.address, tls=tls) as nobody, pytest.raises(Unauthenticated):
            nobody.list_models()
        for address in (running.address, *leaders):
            with Client(address, max_retries=0) as bare, pytest.raises(ConnectionFailed):
                bare.list_models(timeout=5)
        said = subprocess.run(
            [
                *SPS2,
                "generate",
                "--server",
                running.address,
                "--prompt",
                "Once upon a time",
                "--max-tokens",
                "8",
            ],
            env={**os.environ, **secured},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert said.returncode == 0, said.stderr
        assert said.stdout.rstrip("\n") == expected.text
        figures.append(
            f"{1 + len(leaders)} endpoints speak mTLS only; the CLI and the SDK get the same answer"
        )
