"""Must show 7: a client in another language, made from the proto files alone, streams a completion."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from sps2_client import GenerationOptions
from support.deployment import deployment
from support.must_show import MustShow

pytestmark = pytest.mark.acceptance

PACKAGES = ("@grpc/grpc-js@1.14", "@grpc/proto-loader@0.8")
CLIENT = Path(__file__).parent / "stream.js"
QUESTION: GenerationOptions = {"max_tokens": 16, "seed": 7, "temperature": 0.8}
PROMPT = "Once upon a time"


def install(folder: Path) -> None:
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        pytest.skip("@grpc/grpc-js cannot be installed")


def test_node(must_show: MustShow, tmp_path: Path, repo_root: Path) -> None:
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    install(tmp_path)
    script = tmp_path / CLIENT.name
    shutil.copy(CLIENT, script)
    with must_show("7 another language") as figures, deployment() as running, running.client() as client:
        spec = {"text": PROMPT, "sampling": {"temperature": 0.8, "seed": "7"}, "stop": {"maxTokens": 16}}
        done = subprocess.run(
            ["node", script, repo_root / "protos", running.address, json.dumps(spec)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        expected = client.generate(PROMPT, **QUESTION)
        assert answer["text"] == expected.text
        assert answer["tokenIds"] == list(expected.token_ids)
        assert answer["numEvents"] >= len(expected.token_ids) + 2
        assert answer["badField"] == "spec.text"
        figures.append(
            f"Node {answer['node']} streamed {len(expected.token_ids)} tokens in {answer['numEvents']} events, "
            "the same as the SDK's; it reads the field that a refusal names"
        )
