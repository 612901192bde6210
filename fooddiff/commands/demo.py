"""The demo's command: `python -m fooddiff.demo [--workdir=RUN_OR_FILE]`. Owns the flags."""

import argparse
import logging
from collections.abc import Sequence

from fooddiff.commands import flags as shared
from fooddiff.commands import terminal

log = logging.getLogger(__name__)

PORT = 8101


def main(argv: Sequence[str] | None = None) -> None:
    """Serves a web page that draws."""
    parser = shared.Parser(prog="fooddiff-demo", description="Serves a web page to play with a model.")
    shared.add_run(parser, required=False)
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, under any name (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=PORT, help="0 takes any that is free (default: %(default)s)")
    flags = shared.parse(parser, argv)
    with terminal.session(distributed=False):
        _serve(flags)


def _serve(flags: argparse.Namespace) -> None:
    try:
        from fooddiff.demo import server
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the demo needs {error.name}: pip install 'fooddiff[demo]', or pip install -r requirements-demo.txt"
        ) from error
    from fooddiff import api
    from fooddiff.demo.drawing import Painter

    with server.listen(flags.host, flags.port) as listener:  # first, since loading takes longer than being refused
        workdir = api.shipped_weights() if flags.workdir is None else flags.workdir
        painter = Painter(api.load(workdir, step=flags.step, weights=flags.weights))
        host = f"[{flags.host}]" if ":" in flags.host else flags.host
        log.info("step %d, weights %s", painter.model.trained.step, painter.model.trained.weights)
        log.info("open http://%s:%d/ in a browser; Ctrl-C ends it", host, listener.getsockname()[1])
        server.serve(server.make_app(painter, workdir, host=flags.host), listener)
