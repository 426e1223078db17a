"""Draw an AR step of each backbone for docs/backbones.md: ``python docs/backbone_drawings.py``.

Each drawing has the grid of tokens, with the order in which they became known, and the attention of the step:
one row per position that attends, one column per position that it can attend to.
"""

from collections.abc import Callable
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
KNOWN, QUERY, HELD, EMPTY, PLAIN = "#7aa6d8", "#f0a13c", "#d3dce6", "#f4f1e6", "#ffffff"
GRID, CELL, SIDE = 4, 34, 15
TOP, LEFT, MATRIX = 46, 18, 232
ORDER = (6, 9, 3, 12, 5, 10, 0, 15)  # of the any-order models; the last three are drawn in this step


def rectangle(x: float, y: float, side: int, color: str) -> str:
    """Return a square with a border."""
    place = f'x="{x}" y="{y}" width="{side - 2}" height="{side - 2}"'
    return f'<rect {place} rx="2" fill="{color}" stroke="#8b97a3"/>'


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "start") -> str:
    """Return a line of text on the baseline ``y``."""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="#2b333b">{words}</text>'


def token_grid(known: tuple[int, ...], query: tuple[int, ...], rest: str = PLAIN) -> list[str]:
    """Return the tokens: known ones numbered in their order, query positions with a question mark."""
    drawn = [text(LEFT, TOP - 14, "tokens")]
    for position in range(GRID * GRID):
        x, y = LEFT + CELL * (position % GRID), TOP + CELL * (position // GRID)
        color, sign = rest, ""
        if position in known:
            color, sign = KNOWN, str(known.index(position) + 1)
        elif position in query:
            color, sign = QUERY, "?"
        drawn += [rectangle(x, y, CELL, color), text(x + CELL / 2 - 1, y + CELL / 2 + 4, sign, 13, "middle")]
    return drawn


def attention(rows: list[str], columns: list[str], color: Callable[[int, int], str]) -> list[str]:
    """Return the matrix of named rows and columns, whose cell (i, j) is ``color(i, j)``."""
    drawn = [text(MATRIX, TOP - 30, "attention: rows attend to columns")]
    for j, name in enumerate(columns):
        anchor = "middle" if len(name) == 1 else "end"
        drawn.append(text(MATRIX + SIDE * j + (6 if len(name) == 1 else 11), TOP - 6, name, 9, anchor))
    for i, name in enumerate(rows):
        drawn.append(text(MATRIX - 6, TOP + SIDE * i + 10, name, 9, "end"))
        drawn += [
            rectangle(MATRIX + SIDE * j, TOP + SIDE * i, SIDE, color(i, j)) for j in range(len(columns))
        ]
    return drawn


def save(name: str, rows: int, parts: list[str], legend: list[tuple[str, str]]) -> None:
    """Write the drawing of a matrix of so many ``rows``."""
    for index, (color, words) in enumerate(legend):
        y = TOP + CELL * GRID + 22 + 22 * index
        parts += [rectangle(LEFT, y, SIDE, color), text(LEFT + 20, y + 11, words, 11)]
    height = TOP + max(SIDE * rows, CELL * GRID + 22 * (len(legend) + 1)) + 8
    body = "\n".join([f'<rect width="100%" height="100%" fill="{PLAIN}"/>', *parts])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 520 {height}" font-family="sans-serif">'
    (IMAGES / f"backbone-{name}.svg").write_text(f"{head}\n{body}\n</svg>\n", encoding="utf-8")


def masked() -> None:
    """Draw all positions, known or not, attending to all: every AR step computes all of them."""
    known, query = ORDER[:5], ORDER[5:]
    names = [
        "class",
        *(str(known.index(p) + 1) if p in known else "?" if p in query else "" for p in range(16)),
    ]
    colors = {"": EMPTY, "?": QUERY}
    parts = attention(names, names, lambda i, j: colors.get(names[i], KNOWN))
    legend = [(KNOWN, "class and known tokens"), (QUERY, "query positions"), (EMPTY, "other mask tokens")]
    save("masked", len(names), [*token_grid(known, query, EMPTY), *parts], legend)


def causal() -> None:
    """Draw one token after the other: only the last row is computed, the others are in the cache."""
    names = ["class", *(str(number) for number in range(1, 7))]

    def color(i: int, j: int) -> str:
        return PLAIN if j > i else QUERY if i == len(names) - 1 else HELD

    parts = attention(names, names, color)
    legend = [(HELD, "from the cache"), (QUERY, "newest token, predicts the next")]
    save("causal", len(names), [*token_grid(tuple(range(6)), (6,)), *parts], legend)


def block_causal() -> None:
    """Draw new tokens attending to those before them, and query positions to all known tokens."""
    known, query, held = ORDER[:5], ORDER[5:], 3
    columns = ["class", *(str(number) for number in range(1, len(known) + 1))]

    def color(i: int, j: int) -> str:
        if i >= len(columns):
            return QUERY
        return PLAIN if j > i else HELD if i <= held else KNOWN

    parts = attention([*columns, *("?" for _ in query)], columns, color)
    legend = [(HELD, "from the cache"), (KNOWN, "new tokens"), (QUERY, "query positions")]
    save("block-causal", len(columns) + len(query), [*token_grid(known, query), *parts], legend)


if __name__ == "__main__":
    for draw in (masked, causal, block_causal):
        draw()
