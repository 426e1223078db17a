"""Write the tables of docs/reference/recipe.md from the dataclasses: python docs/recipe_keys.py"""

from pathlib import Path

from far.files import atomic_path
from far.recipe_keys import as_markdown

PAGE = Path(__file__).parent / "reference" / "recipe.md"
MARK = "<!-- The rest is written by: python docs/recipe_keys.py -->\n"


def page() -> str:
    """Return the page with tables made from the current code."""
    head, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    return f"{head}{mark}\n{as_markdown()}"


if __name__ == "__main__":
    text = page()
    with atomic_path(PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
