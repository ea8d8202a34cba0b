"""The router over real gRPC. Chat messages: the model's own template, and nobody else's."""

from pathlib import Path
from typing import Any

import pytest

from sps2.v1 import generation_pb2, tokenizer_service_pb2, tokenizer_service_pb2_grpc
from sps2_router.tokenizer import ModelTokenizer
from support.router_deployment import Code, Deployment, failure, fields, reason
from support.tiny_model import BOS, CHAT_TEMPLATE, CONTEXT_LENGTH, tiny_tokenizer, write_tiny_model

pytestmark = pytest.mark.service


def chat(*turns: tuple[str, str], template: str = "") -> generation_pb2.ChatMessages:
    messages = (generation_pb2.ChatMessage(role=role, content=content) for role, content in turns)
    return generation_pb2.ChatMessages(messages=messages, chat_template=template)


def spec(*turns: tuple[str, str], template: str = "") -> generation_pb2.GenerationSpec:
    return generation_pb2.GenerationSpec(chat=chat(*turns, template=template))


async def test_messages_become_the_prompt_that_the_template_makes(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer.from_folder(write_tiny_model(tmp_path / "chat", CHAT_TEMPLATE))
    async with Deployment(tokenizer) as up:
        turns = [("system", "be brief"), ("user", "hello {{ 7 * 7 }}")]
        await up.generate(spec(*turns))
        text = "[system]be brief[user]hello {{ 7 * 7 }}[assistant]"
        expected = tiny_tokenizer().encode(text).ids  # which puts the one <|bos|> in front
        assert expected[0] == BOS
        assert list(up.prefill.requests[0].token_ids) == expected
        stub: Any = tokenizer_service_pb2_grpc.TokenizerServiceStub(up.channel)
        request = tokenizer_service_pb2.TokenizeTextRequest(chat=chat(*turns))
        assert list((await stub.TokenizeText(request)).token_ids) == expected
        both = tokenizer_service_pb2.TokenizeTextRequest(text="x", chat=chat(*turns))
        error = await failure(stub.TokenizeText(both))
        assert (error.code(), fields(error)) == (Code.INVALID_ARGUMENT, ["chat"])
        await up.assert_all_freed()


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (spec(), "spec.chat.messages"),
        (spec(*[("user", "x")] * 1025), "spec.chat.messages"),
        (spec(("user", "x"), ("", "y")), "spec.chat.messages[1].role"),
        (spec(("r" * 65, "x")), "spec.chat.messages[0].role"),
        (spec(("us\ner", "x")), "spec.chat.messages[0].role"),
        (spec(("user", "x"), template="{{ messages }}"), "spec.chat.chat_template"),
        (spec(("tool", "x")), "spec.chat.messages"),
    ],
)
async def test_messages_that_are_refused(
    tmp_path: Path, bad: generation_pb2.GenerationSpec, field: str
) -> None:
    tokenizer = ModelTokenizer.from_folder(write_tiny_model(tmp_path / "chat", CHAT_TEMPLATE))
    async with Deployment(tokenizer) as up:
        error = await failure(up.whole(bad))
        assert (error.code(), fields(error)) == (Code.INVALID_ARGUMENT, [field])
        await up.assert_all_freed()


async def test_messages_beyond_the_context(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer.from_folder(write_tiny_model(tmp_path / "chat", CHAT_TEMPLATE))
    async with Deployment(tokenizer) as up:
        too_long = CONTEXT_LENGTH * tokenizer.longest_token + 1
        for length, field in ((too_long, "spec.chat.messages"), (CONTEXT_LENGTH, "spec.prompt")):
            error = await failure(up.whole(spec(("user", "z" * length))))
            assert (error.code(), fields(error)) == (Code.OUT_OF_RANGE, [field])


async def test_a_model_without_a_template(up: Deployment) -> None:
    error = await failure(up.whole(spec(("user", "hello"))))
    assert (error.code(), reason(error)) == (Code.FAILED_PRECONDITION, "NO_CHAT_TEMPLATE")
    await up.generate(generation_pb2.GenerationSpec(text="!"))
