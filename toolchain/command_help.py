"""Print the usage lines of the help in a plainer form than typer's: `clipkd report [OPTIONS] RUN...`."""

from typing import Any

from typer.core import TyperCommand, TyperGroup

_TYPES = {"<bool>": "", "<int range>": "N", "<float range>": "X", "<path>": "PATH", "<str>": "TEXT"}
_TYPES["<list[Path]>"] = "PATH"


def _name_values(params: list[Any], ctx: Any) -> list[Any]:
    """Name the value of each option in the help, as in `--out PATH`; a flag has none."""
    for param in params:
        if param.param_type_name == "option" and param.metavar is None:
            param.metavar = _TYPES.get(param.display_type(ctx))
    return params


class HelpCommand(TyperCommand):
    """A command whose usage is `clipkd report [OPTIONS] RUN...`, without typer's braces around RUN."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _name_values(super().get_params(ctx), ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [param for param in self.params if param.param_type_name == "argument"]
        return ["[OPTIONS]", *(param.metavar or str(param.name).upper() for param in arguments)]


class HelpGroup(TyperGroup):
    """A group of commands, with the same names for values."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _name_values(super().get_params(ctx), ctx)
