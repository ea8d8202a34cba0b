"""The `sps2` command: one module for each subcommand, put together here."""

import typer

from sps2_cli.connect import connect_options
from sps2_cli.demo import demo
from sps2_cli.drain import drain
from sps2_cli.generate import generate
from sps2_cli.measure import bench, evaluate
from sps2_cli.resize import resize
from sps2_cli.scale import scale
from sps2_cli.status import status
from sps2_cli.top import top
from sps2_cli.up import up

HELP = """LLM serving with sequence-parallel prefill and decode.

Exit codes: 0 done; 1 failed; 2 usage; 3 the service refused; 4 cannot connect; 130 interrupted.

For example:

```
sps2 up
sps2 generate --prompt "Once upon a time" --max-tokens 64
sps2 status --watch
```
"""

app = typer.Typer(
    name="sps2",
    help=HELP,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.callback()(connect_options)
app.command()(up)
app.command()(generate)
app.command()(status)
app.command()(top)
app.command()(scale)
app.command()(drain)
app.command()(resize)
app.command()(demo)
# Their options are those of another program, which explains them itself.
HANDED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("bench", context_settings=HANDED_ON, add_help_option=False)(bench)
app.command("eval", context_settings=HANDED_ON, add_help_option=False)(evaluate)
