"""KV from prefill ranks to decode ranks: slabs, staged in a ring that belongs to one source alone.

`sender.KvSender` and `receiver.KvReceiver` are what engines call; `base` says who calls what.
"""
