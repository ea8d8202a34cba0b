"""Formats and slabs that are wrong whatever was placed: which field is named."""

import pytest

from sps2.internal.v1.kv_transfer_service_pb2 import KvFormat, PushSlabsRequest
from sps2_engine.kv_transfer.slab import format_fault, slab_fault
from support.slabs import TOKEN_BYTES, header_of, kv_format


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"num_layers": 3}, "num_layers"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"head_dim": -4}, "head_dim"),
        ({"model_hash": "other", "head_dim": 0}, "head_dim"),
    ],
)
def test_a_format_of_no_model(changed: dict[str, object], field: str) -> None:
    theirs = KvFormat(**{name.name: value for name, value in kv_format().ListFields()} | changed)
    fault = format_fault(kv_format(), theirs)
    assert fault is not None
    assert fault.field == field


def test_a_format_that_is_only_not_ours_is_no_fault() -> None:
    theirs = kv_format()
    theirs.model_hash, theirs.num_layers, theirs.dtype = "other", 7, "fp32"
    assert format_fault(kv_format(), theirs) is None


def test_a_payload_that_is_not_as_long_as_its_header_says() -> None:
    payload = bytes(70 * TOKEN_BYTES)
    request = PushSlabsRequest(header=header_of(payload), payload=payload)
    assert slab_fault(request, kv_format()) is None
    request.payload = payload[1:]
    fault = slab_fault(request, kv_format())
    assert fault is not None
    assert fault.field == "payload"
