"""python -m sps2_router: one router process."""

import asyncio
import os
import sys

from sps2_layout.profile_file import ProfileError
from sps2_router.app import Router, served_model
from sps2_router.chat_template import ChatTemplateError
from sps2_router.config import RouterConfig
from sps2_router.tokenizer import ModelTokenizer, TokenizerAbsentError
from sps2_service.config import load_config
from sps2_service.directory_client import DirectoryClient
from sps2_service.followed_file import LinesError
from sps2_service.model_folder import ModelFolder, ModelFolderError
from sps2_service.run import prepare_process, run_service
from sps2_service.tracing import open_tracing

EXAMPLES = (
    "--listen 0.0.0.0:50051 --directory 127.0.0.1:50060 --model models/demo",
    "--directory 127.0.0.1:50060 --model models/demo --profile exact",
)


async def serve(config: RouterConfig) -> int:
    """Runs until SIGTERM; the exit code."""
    folder = ModelFolder(config.model, weights=not config.model_hash)
    model = served_model(folder, config.model_name, config.model_hash)
    tokenizer = ModelTokenizer.from_folder(config.model, config.tokenizer_threads)
    async with (
        open_tracing(
            "sps2-router", config.advertise, config.trace_endpoint, config.trace_sample_ratio
        ) as tracing,
        DirectoryClient(config.directory, tls=config.tls) as directory,
    ):
        router = Router(config, model, tokenizer, directory.membership(), directory, tracing)
        try:
            return await run_service(
                router.server,
                config,
                router.registry,
                on_started=router.started,
                background=router.follow,
                drain=router.drain,
            )
        finally:
            await router.close()


def main() -> int:
    """Entry point; exit code 1 and one line for a model folder or profile that cannot be served."""
    os.environ["USE_TORCH"] = (
        "0"  # transformers, which renders chat templates, would import it where it is installed
    )
    config = load_config(RouterConfig, prog="python -m sps2_router", examples=EXAMPLES)
    prepare_process("router", config)
    try:
        return asyncio.run(serve(config))
    except (ModelFolderError, TokenizerAbsentError, ChatTemplateError, ProfileError, LinesError) as error:
        sys.stderr.write(f"sps2_router: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
