"""The mood of docstrings: a function "Returns ...". Commands are imperative, as their help is."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPERATIVES = (
    "Add Apply Build Call Check Clip Combine Compute Continue Copy Count Create Describe Destroy Do "
    "Draw End Exit Fetch Fill Find Finish Fix Flush Give Import Join Kill Let Link List Load "
    "Lock Make Map Mark Measure Merge Move Open Parse Pass Prepare Print Put Raise Read Record "
    "Remove Rename Replace Report Restore Resume Return Run Save Seed Select Send Set Show Skip "
    "Split Start Stop Store Sum Suppress Take Train Turn Update Wait Warn Write Yield"
)
NOT_DECLARED = {"data_prep/cli.py: commands"}
"""Without parameters of typer, but typer shows its docstring all the same."""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """All functions and methods but those that typer runs, which have parameters of typer."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and "typer." not in ast.unparse(node.args):
            yield node


def test_docstrings_are_in_the_third_person():
    wrong = []
    for package in ("gengram_megatron", "data_prep"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for function in functions(ast.parse(path.read_text())):
                word = (ast.get_docstring(function) or "-").split()[0].rstrip(",.:;")
                place = f"{path.relative_to(ROOT)}: {function.name}"
                if word in IMPERATIVES.split() and place not in NOT_DECLARED:
                    wrong.append(f'{place}: "{word}" should be in the third person ("Returns")')
    assert not wrong, "\n".join(wrong)
