"""What a command says and how it ends: results on stdout, errors on stderr, the exit code (see errors.py)."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from xdplb.errors import CompileError, ConfigError, NotPrivileged, UsageError, XdplbError

if TYPE_CHECKING:
    from rich.console import RenderableType

INTERRUPTED = 130
"""As shells say it: 128 + SIGINT."""


class HelpWanted(click.UsageError):
    """A command was left out; the message is the help."""


def show_json(result: object) -> None:
    click.echo(json.dumps(result, indent=2))


def show(renderable: RenderableType) -> None:
    """As wide as its words: a narrow terminal breaks lines, but no number is cut. No blanks at the end of lines."""
    from rich.console import Console

    out = Console(width=1000)
    with out.capture() as capture:
        out.print(renderable)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()), color=True)


def complain(error: XdplbError) -> int:
    """Prints the error as people read it; returns its exit code."""
    if isinstance(error, CompileError) and error.log:
        click.echo(error.log.rstrip("\n"), err=True)
    if isinstance(error, ConfigError):
        for mistake in error.mistakes:
            click.echo(mistake, err=True)
    else:
        click.echo(f"xdplb: {error.message}", err=True)
    if error.hint:
        click.echo(f"  hint: {error.hint}", err=True)
    return error.exit_code


def guarded(action: Callable[[], object]) -> int:
    """Runs `action`; an integer it returns is the exit code. Errors are printed: those for people without traceback."""
    try:
        result = action()
    except XdplbError as error:
        return complain(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except PermissionError as error:
        return complain(NotPrivileged(f"{error.filename or 'xdplb'}: {error.strerror or error}", "Run it with sudo."))
    except Exception:
        traceback.print_exc()
        click.echo("xdplb: this is a bug. Please report it with the lines above.", err=True)
        return XdplbError.exit_code
    return result if isinstance(result, int) else 0


def run(command: click.Command, args: Sequence[str] | None) -> int:
    """Runs the command line and returns its exit code."""

    def invoke() -> object:
        try:
            return command.main(args, prog_name="xdplb", standalone_mode=False)
        except click.UsageError as error:
            return _explain_usage(error)
        except click.ClickException as error:
            return complain(XdplbError(error.format_message()))
        except click.Abort:
            return INTERRUPTED

    try:
        code = guarded(invoke)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has what it wanted; nothing may be flushed at exit any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return XdplbError.exit_code
    return code


def _explain_usage(error: click.UsageError) -> int:
    if isinstance(error, HelpWanted):
        click.echo(error.message, err=True)
        return UsageError.exit_code
    path = error.ctx.command_path if error.ctx else "xdplb"
    return complain(UsageError(error.format_message(), f"{path} --help says what it takes."))
