"""The router's flags."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sps2_layout.profiles import DEFAULT
from sps2_router.front_door import TimeLimits
from sps2_router.prompt_queue import QueueLimits
from sps2_router.retries import RetryLimits
from sps2_router.scheduler import SchedulerLimits
from sps2_service.config import ServiceConfig, check_address, setting

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class RouterConfig(ServiceConfig):
    """The router of SPS2: the public gRPC service."""

    model: Path = setting()
    """Folder of the served model: config, tokenizer and, unless --model-hash is given, the weights."""
    model_hash: str = ""
    """Hash of the served model, 64 hexadecimal digits, as `python -m sps2_service.model_hash FOLDER` prints it; only
    groups that have it get work. Empty: that of the weights in --model."""
    directory: str = setting()
    """HOST:PORT of the KV directory."""
    advertise: str = ""
    """HOST:PORT at which other routers reach this one; empty: the address it is bound to."""
    auth_tokens: Path | None = None
    """File of bearer tokens, read again when it changes: lines of TENANT SHA256 [operator] [until=TIME]. Without it
    everybody may call."""
    tenants: Path | None = None
    """File of what tenants may use, read again when it changes: lines of TENANT [weight=2] [max-queued-tokens=N]
    [max-live-requests=N] [tokens-per-minute=N], `*` for the rest. Without it nobody has limits of its own."""
    max_connection_age_s: float | None = setting(1800.0, minimum=1)
    """Seconds after which a connection is closed once its calls have ended, so that clients find new routers; empty:
    never."""
    model_name: str = ""
    """Name that requests use; empty: the folder's name."""
    profile: str = DEFAULT.name
    """Attention of prompts whose request names none: exact, paper, default, or a JSON file of profiles."""
    policy: Literal["prefix_aware", "least_loaded", "round_robin"] = "prefix_aware"
    """How groups are picked: the ones that are done soonest, cached prompts counted; with the least to do; in turns."""
    max_queued_tokens: int = setting(QueueLimits.max_tokens, minimum=1)
    """Prompt tokens that may wait for their prefill; more are refused, but no request alone, no tenant in its share."""
    max_live_requests: int = setting(1024, minimum=1)
    """Requests that are served at once; more are refused."""
    prefills_per_group: int = setting(SchedulerLimits.prefills_per_group, minimum=1)
    """Requests that one prefill group holds at once; the rest waits here, without KV."""
    max_queue_s: float = setting(RetryLimits.queue_wait_s, minimum=0)
    """Most seconds that a new request waits for its prefill; expected to wait for over half of it, it is refused."""
    regroup_wait_s: float = setting(SchedulerLimits.regroup_wait_s, minimum=0)
    """Seconds that a request which lost its group waits for another one."""
    max_attempts: int = setting(RetryLimits.max_attempts, minimum=1)
    """Attempts of a request that may fail before it does, whatever of its answer was sent; preemptions do not count."""
    admission_wait_s: float = setting(RetryLimits.admission_wait_s, minimum=0)
    """Seconds that a new request which a decode group had no room for waits for some."""
    max_request_s: float = setting(TimeLimits.total_s, minimum=1)
    """Longest life of a request, in seconds."""
    max_silence_s: float = setting(TimeLimits.silence_s, minimum=1)
    """Longest time without any event of a request, in seconds; waiting in the queue is none."""
    tokenizer_threads: int = setting(2, minimum=1, maximum=64)
    """Prompts that are tokenized at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_address("--directory", self.directory)
        if self.advertise:
            check_address("--advertise", self.advertise)
        if self.model_hash and not _SHA256.fullmatch(self.model_hash):
            raise ValueError(f"--model-hash {self.model_hash!r} is not 64 hexadecimal digits in lower case")

    @property
    def queue_limits(self) -> QueueLimits:
        """For PromptQueue."""
        return QueueLimits(self.max_queued_tokens, self.max_queue_s)

    @property
    def scheduler_limits(self) -> SchedulerLimits:
        """For Scheduler."""
        return SchedulerLimits(self.prefills_per_group, self.regroup_wait_s)

    @property
    def retry_limits(self) -> RetryLimits:
        """For Retries."""
        return RetryLimits(self.max_attempts, self.admission_wait_s, self.max_queue_s)

    @property
    def time_limits(self) -> TimeLimits:
        """For FrontDoor."""
        return TimeLimits(self.max_request_s, self.max_silence_s)
