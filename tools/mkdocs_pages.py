"""Hook of mkdocs: pages that are files at the repository's top, with links made to fit the site."""

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
    """Return the Markdown of a page: that of the file at the top if it shows one."""
    name = PAGES.get(page.file.src_uri)
    if name is None:
        return markdown
    markdown = (TOP / name).read_text(encoding="utf-8").replace("](docs/", "](")
    for page_name, file_name in PAGES.items():
        markdown = markdown.replace(f"]({file_name})", f"]({page_name})")
    return markdown
