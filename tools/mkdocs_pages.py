"""Hook of mkdocs: pages that show files outside of docs/.

The files at the repository's top get links that fit the site. An example, a script in the percent
format of Jupytext, becomes text and code.
"""

import re
from pathlib import Path

TOP = Path(__file__).parents[1]
PAGES = {
    "readme.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
"""Pages, which are empty in docs/, and the files that they show."""


def on_page_markdown(markdown, page, **_):
    """Return the Markdown of a page: that of the file which it shows if it shows one."""
    path = Path(page.file.src_uri)
    if path.parent.name == "examples":
        return example(path.stem)
    if path.name not in PAGES or path.parent.name:
        return markdown
    markdown = (TOP / PAGES[path.name]).read_text(encoding="utf-8")
    markdown = markdown.replace("](examples)", "](examples/generate_on_three_backends.md)")
    markdown = markdown.replace("](docs/", "](")
    for page_name, file_name in PAGES.items():
        markdown = markdown.replace(f"]({file_name})", f"]({page_name})")
    return markdown


def example(name):
    """Return an example as Markdown."""
    script = (TOP / f"examples/{name}.py").read_text(encoding="utf-8")
    parts = []
    for kind, cell in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", script, re.M | re.S):
        cell = cell.strip()
        parts.append(re.sub("^# ?", "", cell, flags=re.M) if kind else f"```python\n{cell}\n```")
    how = f"Run it with `python examples/{name}.py`. `make notebooks` makes a notebook of it."
    parts.insert(1, how)
    return "\n\n".join(parts)
