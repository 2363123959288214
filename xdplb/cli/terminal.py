"""What a command says and how it ends: results on stdout, errors on stderr, the exit code (see errors.py)."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import click

from xdplb.errors import CompileError, ConfigError, NotPrivileged, UsageError, XdplbError

if TYPE_CHECKING:
    from rich.console import RenderableType

INTERRUPTED = 130
"""As shells say it: 128 + SIGINT."""


_OF_THE_HOST = {
    errno.ENOSPC: "Make room: df -h says which disk is full.",
    errno.EDQUOT: "Make room, or raise the quota.",
    errno.EROFS: "Mount it to be written: mount -o remount,rw ...",
    errno.EACCES: "Even root may not: look at the mount, the security module, and the service's restrictions.",
    errno.EPERM: "Even root may not: look at the mount, the security module, and the service's restrictions.",
    errno.EIO: "Look at the disk: dmesg.",
    errno.EMFILE: "Raise the limit of open files: ulimit -n.",
    errno.ENFILE: "Raise the limit of open files: sysctl fs.file-max.",
    errno.ENOMEM: "Give it more memory.",
    errno.ENOTDIR: "Move away what stands in the place of a directory.",
    errno.ELOOP: "Look at the links on that path.",
}
"""Errors that are no bug, and what to do about each."""


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
    """Prints the error as people read it; returns its exit code, also where it cannot be printed."""
    with suppress(OSError):
        _print(error)
    return error.exit_code


def _print(error: XdplbError) -> None:
    if isinstance(error, CompileError) and error.log:
        click.echo(error.log.rstrip("\n"), err=True)
    if isinstance(error, ConfigError):
        for mistake in error.mistakes:
            click.echo(mistake, err=True)
    else:
        click.echo(f"xdplb: {error.message}", err=True)
    if error.hint:
        click.echo(f"  hint: {error.hint}", err=True)


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
    except OSError as error:
        if error.errno not in _OF_THE_HOST:
            return _bug()
        return complain(_in_words(error))
    except Exception:
        return _bug()
    return result if isinstance(result, int) else 0


def _bug() -> int:
    with suppress(OSError):
        traceback.print_exc()
        click.echo("xdplb: this is a bug. Please report it with the lines above.", err=True)
    return XdplbError.exit_code


def _in_words(error: OSError) -> XdplbError:
    """What this host refuses, and where."""
    if _while_printing(error):
        return XdplbError(f"the output cannot be written: {error.strerror}")
    words = f"{error.filename}: {error.strerror}" if error.filename else f"this host refuses: {error.strerror}"
    if isinstance(error, PermissionError) and os.geteuid() != 0:
        return NotPrivileged(words, "Run it with sudo.")
    return XdplbError(words, _OF_THE_HOST[error.errno or 0])


def _while_printing(error: OSError) -> bool:
    """Everything is printed by click and rich, which say no name of a file."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_globals["__name__"].partition(".")[0] in ("click", "rich")


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
        return guarded(invoke) or guarded(partial(click.echo, nl=False))
    except BrokenPipeError:  # the reader has what it wanted
        return XdplbError.exit_code
    finally:
        _drop_unwritten()


def _drop_unwritten() -> None:
    """What could not be written is not tried again at exit, where it would be a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _explain_usage(error: click.UsageError) -> int:
    if isinstance(error, HelpWanted):
        click.echo(error.message, err=True)
        return UsageError.exit_code
    path = error.ctx.command_path if error.ctx else "xdplb"
    return complain(UsageError(error.format_message(), f"{path} --help says what it takes."))
