"""Hooks of the documentation site: reference pages that are generated from the code, and formulas as MathML.

A line such as ``{{ settings }}`` is replaced by what the function of that name in `PAGES` returns.
"""

import html
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

import click
from griffe import Docstring, DocstringSectionAttributes
from latex2mathml.converter import convert

from defectflow.config import CONFIGS
from sprue.cli import main
from sprue.config import FLOW_SETTINGS, DatasetSettings, Recipe, Settings
from sprue.formats import FORMATS
from sprue.serving.app import app

JSON = dict[str, Any]

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_GENERATED = re.compile(r"^{{ (\w+) }}$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in what is generated."""
    return _GENERATED.sub(lambda match: PAGES[match[1]](), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Renders formulas, so that no page needs a script for them."""
    return _FORMULA.sub(lambda match: _mathml(match[1] == "div", html.unescape(match[2])), content)


def _mathml(is_block: bool, formula: str) -> str:
    rendered = convert(formula.strip(), display="block" if is_block else "inline")
    # The converter sets a function and its argument without a space.
    return re.sub(r"(<mi>(?:log|arctan|exp|min|max)</mi>)(?!<mo)", r'\1<mspace width="0.17em"/>', rendered)


def settings() -> str:
    """A table for each section of a dataset's settings."""
    parts = []
    for name, section in DatasetSettings.model_fields.items():
        if name == "flow":
            continue
        model = section.annotation
        if isinstance(model, type) and issubclass(model, Settings):
            of_recipe = " Part of the recipe." if name in Recipe.model_fields else ""
            parts.append(f"### {name}\n\n{inspect.getdoc(model)}{of_recipe}\n\n{_table(_rows(name, model))}")
    for name, model in FLOW_SETTINGS.items():
        described = _attributes(
            inspect.getdoc(CONFIGS[name]) or "", *(inspect.getdoc(base) or "" for base in CONFIGS[name].__mro__)
        )
        parts.append(f"### flow: {name}\n\n{_table(_rows('flow', model, described))}")
    return "\n\n".join(parts)


def _rows(section: str, model: type[Settings], described: dict[str, str] | None = None) -> Iterator[tuple[str, ...]]:
    """Path, type, default, allowed values and description of each setting."""
    schema = model.model_json_schema()
    for name, field in schema["properties"].items():
        kind, allowed = _type(field)
        default = "required" if name in schema.get("required", []) else f"`{json.dumps(field.get('default'))}`"
        if described and name != "name" and field.get("default") is None:
            default = "the flow's"
        description = field.get("description") or (described or {}).get(name, "")
        yield f"`{section}.{name}`", kind, default, allowed, description


def _type(field: JSON) -> tuple[str, str]:
    """Type and allowed values of a JSON schema."""
    if "anyOf" in field:
        kinds, allowed = zip(*map(_type, field["anyOf"]), strict=True)
        return " or ".join(kinds), "; ".join(filter(None, allowed))
    if "const" in field:
        return "string", f"`{field['const']}`"
    if "enum" in field:
        return "string", ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        items = field.get("prefixItems") or [field.get("items", {})]
        kind, allowed = _type(items[0])
        length = f"{len(items)} of them" if "prefixItems" in field else ""
        if field.get("minItems") == 1:
            length = "at least one"
        return f"list of {kind}", ", ".join(filter(None, (length, f"each {allowed}" if allowed else "")))
    if field.get("type") == "object":
        return "mapping", ""
    bounds = (("exclusiveMinimum", "above"), ("minimum", "from"), ("maximum", "to"), ("exclusiveMaximum", "below"))
    allowed = " ".join(f"{word} {field[bound]:g}" for bound, word in bounds if bound in field)
    return field.get("type", "any"), allowed


def _attributes(*docstrings: str) -> dict[str, str]:
    """What docstrings say of attributes, the first docstring first."""
    found: dict[str, str] = {}
    for text in docstrings:
        for part in Docstring(text).parse("google"):
            if isinstance(part, DocstringSectionAttributes):
                for attribute in part.value:
                    found.setdefault(attribute.name, " ".join(attribute.description.split()))
    return found


def commands() -> str:
    """Usage, help and options of each command, as click prints them."""
    context = click.Context(main, info_name="sprue")
    return "\n\n".join([_command(main, context), *_subcommands(main, context)])


def _subcommands(group: click.Group, context: click.Context) -> Iterator[str]:
    for each in group.commands.values():
        yield _command(each, context)
        if isinstance(each, click.Group):
            yield from _subcommands(each, click.Context(each, info_name=each.name, parent=context))


def _command(command: click.Command, parent: click.Context) -> str:
    context = parent if command is main else click.Context(command, info_name=command.name, parent=parent)
    parts = [f"## {context.command_path}", inspect.cleandoc(command.help or "")]
    parts.append(f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```")
    options = [each for each in command.params if isinstance(each, click.Option)]
    rows = [(f"`{names}`", text) for names, text in filter(None, (each.get_help_record(context) for each in options))]
    return "\n\n".join([*parts, _table(rows, ("option", "description"))] if rows else parts)


def formats() -> str:
    """The stored formats and their versions."""
    rows = ((each.name, str(each.version), each.remedy) for each in FORMATS)
    return _table(rows, ("format", "version", "what to do with a file that is too old"))


def http() -> str:
    """The routes of the scoring service, and what they return."""
    description = app.openapi()
    parts = [
        _route(method, path, route) for path, routes in description["paths"].items() for method, route in routes.items()
    ]
    parts.append("## Bodies")
    parts += [_body(name, schema) for name, schema in description["components"]["schemas"].items()]
    return "\n\n".join(parts)


def _route(method: str, path: str, route: JSON) -> str:
    parts = [f"## {method.upper()} {path}", route["description"]]
    if "parameters" in route:
        rows = [
            (f"`{each['name']}`", each["in"], _reference(each["schema"]), each.get("description", ""))
            for each in route["parameters"]
        ]
        parts.append(_table(rows, ("parameter", "in", "type", "description")))
    if "requestBody" in route:
        parts.append("Content types of the body: " + ", ".join(f"`{kind}`" for kind in route["requestBody"]["content"]))
    parts.append(_table(_responses(route["responses"]), ("status", "meaning", "body", "error codes")))
    headers = route["responses"].get("200", {}).get("headers", {})
    if headers:
        rows = [(f"`{name}`", each["schema"]["type"], each["description"]) for name, each in headers.items()]
        parts.append(_table(rows, ("header of status 200", "type", "description")))
    return "\n\n".join(parts)


def _responses(responses: JSON) -> Iterator[tuple[str, ...]]:
    for status, response in responses.items():
        contents = response.get("content", {})
        bodies = [
            _reference(each["schema"]) if "$ref" in each["schema"] else f"`{kind}`" for kind, each in contents.items()
        ]
        codes = [f"`{code}`" for each in contents.values() for code in each.get("examples", {})]
        yield status, response["description"], " or ".join(bodies), ", ".join(codes)


def _body(name: str, schema: JSON) -> str:
    required = schema.get("required", [])
    rows = [
        (f"`{field}`", _reference(each), "yes" if field in required else "no", each.get("description", ""))
        for field, each in schema["properties"].items()
    ]
    return (
        f"### {name}\n\n{schema.get('description', '')}\n\n{_table(rows, ('field', 'type', 'required', 'description'))}"
    )


def _reference(schema: JSON) -> str:
    """A schema's type; that of a body is a link to it."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_reference(each) for each in schema["anyOf"] if each.get("type") != "null")
    if schema.get("type") == "array":
        return f"list of {_reference(schema['items'])}"
    return ", ".join(f"`{value}`" for value in schema["enum"]) if "enum" in schema else str(schema.get("type", "any"))


def _table(rows: Any, headings: tuple[str, ...] = ("setting", "type", "default", "allowed", "description")) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that stays in its cell; Markdown takes no pipe in code for a border."""
    one_line = " ".join(text.replace("``", "`").split())
    return re.sub(r"(`[^`]*`)|\|", lambda match: match[1] or r"\|", one_line)


PAGES = {"settings": settings, "commands": commands, "formats": formats, "http": http}
