"""The commands of this room, put together: one module for each measurement."""

import typer

from sps2_bench.accuracy.command import accuracy
from sps2_bench.decode.command import decode
from sps2_bench.kernel_rates.command import kernels
from sps2_bench.prefill.command import prefill

app = typer.Typer(
    help="Measures SPS2 against its baselines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Speed, bytes and memory, side by side with baselines.", no_args_is_help=True)
evaluate = typer.Typer(help="What sparse attention costs in accuracy.", no_args_is_help=True)

bench.command()(prefill)
bench.command()(decode)
bench.command()(kernels)
evaluate.command()(accuracy)
# With a single command typer would drop its name, and `sps2 eval accuracy` must keep it.
evaluate.callback()(lambda: None)
app.add_typer(bench, name="bench")
app.add_typer(evaluate, name="eval")
