"""Write the table of train.py's options into training.md: python -m docs.options"""

import os

from support.settings import OPTIONS, RECIPE, flag

START, END = "<!-- options -->\n", "<!-- /options -->\n"
PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "training.md")


def options_table():
    """Return the options of train.py as a Markdown table."""
    lines = ["| option | default | what it is |", "|---|---|---|"]
    for row in OPTIONS:
        if row.default is RECIPE:
            default = "recipe, data or device"
        elif row.default is None or row.default is False or row.default == []:
            default = ""
        else:
            default = f"`{row.default}`"
        lines.append(f"| `{flag(row.name)}` | {default} | {row.help} |")
    return "\n".join(lines) + "\n"


def with_table(page):
    """Return the text of the page with the present table between its two marks."""
    before, rest = page.split(START)
    _, after = rest.split(END)
    return before + START + options_table() + END + after


if __name__ == "__main__":
    with open(PAGE, encoding="utf-8") as file:
        page = file.read()
    with open(PAGE, "w", encoding="utf-8") as file:
        file.write(with_table(page))
