"""Errors on their way over the control socket: what a handler raises, the command raises.

    {"message": "...", "hint": "...", "exit_code": 1, "mistakes": [...], "log": "..."}

`mistakes` stand where a configuration is not valid, `log` where a program did not compile.
"""

from __future__ import annotations

from xdplb.api.messages import JSON
from xdplb.errors import BY_EXIT_CODE, CompileError, ConfigError, XdplbError


def encode(error: XdplbError) -> dict[str, JSON]:
    body: dict[str, JSON] = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
    if isinstance(error, ConfigError):
        body["mistakes"] = list(error.mistakes)
    if isinstance(error, CompileError):
        body["log"] = error.log
    return body


def decode(body: dict[str, JSON]) -> XdplbError:
    message, hint, mistakes, log_text = str(body["message"]), str(body["hint"]), body.get("mistakes"), body.get("log")
    if isinstance(mistakes, list):
        return ConfigError([str(mistake) for mistake in mistakes], hint)
    if isinstance(log_text, str):
        return CompileError(message, hint, log_text)
    exit_code = body["exit_code"]
    kind = BY_EXIT_CODE.get(exit_code, XdplbError) if isinstance(exit_code, int) else XdplbError
    return kind(message, hint)
