"""Write the repository's public address wherever it is needed, from the one place where it stands.

The address is ``Repository`` under ``[project.urls]`` in pyproject.toml. From it come the repository and launch buttons
(_config.yml), the Colab badge and the Colab set-up cell of every notebook, and the citation. ``make address`` runs this
file after a change; a test fails where they disagree. While the address is not settled, nothing leads to it.
"""

import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLONE = "metaadamw_book"
"""Folder of the clone on Colab. Named as the package, it would hide the package from Python in the folder above."""


def address() -> str:
    """The public address of the repository, without a slash at the end."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["urls"]["Repository"]).rstrip("/")


def is_settled(url: str) -> bool:
    """Whether an address leads somewhere; until then it has a placeholder for the owner."""
    return "/OWNER/" not in url


def colab_badge(url: str, notebook: str) -> str:
    """The Markdown of a notebook's badge; a note while the address leads nowhere."""
    if not is_settled(url):
        return "*The badge that opens this chapter on Colab comes with the repository's public address.*"
    path = url.partition("github.com/")[2]
    link = f"https://colab.research.google.com/github/{path}/blob/main/notebooks/{notebook}"
    return f"[![Open in Colab](../book/_static/colab.svg)]({link})"


def colab_setup(url: str) -> str:
    """The source of a notebook's set-up cell, which can be run again; it pins nothing that Colab brings.

    Args:
        url: of the repository; anything that git clones.
    """
    if is_settled(url):
        imports, address = "from pathlib import Path\n", f'url = "{url}"\n'
        clone = 'f"This notebook needs its repository: clone {url}, "'
        fetch = (
            f"    ![ -d {CLONE} ] || git clone -q --depth 1 {{url}} {CLONE}\n"
            f"    !{{sys.executable}} -m pip install -q -e {CLONE}[experiments]\n"
            f'    sys.path.insert(0, str(Path("{CLONE}").resolve()))\n'
        )
    else:
        imports = address = ""
        clone = '"This notebook needs its repository: clone the repository of this book, "'
        fetch = (
            "    raise RuntimeError(\n"
            '        "The repository has no public address yet: Colab cannot fetch it."\n'
            "    )\n"
        )
    return (
        "# On Colab this fetches the code and the records of the book; elsewhere it does nothing.\n"
        f"import importlib.util\nimport sys\n{imports}\n"
        f"{address}"
        'if "google.colab" in sys.modules:\n'
        f"{fetch}"
        'if importlib.util.find_spec("metaadamw_lite") is None:\n'
        "    raise ModuleNotFoundError(\n"
        f"        {clone}\n"
        '        "run `make lab` there, and open it from its folder `notebooks`."\n'
        "    )"
    )


def addressed() -> dict[Path, str]:
    """Every file that holds the address, with the text it should have."""
    url = address()
    texts = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["id"] == "colab-badge":
                cell["source"] = colab_badge(url, path.name).splitlines(keepends=True)
            elif cell["id"] == "colab-setup":
                cell["source"] = colab_setup(url).splitlines(keepends=True)
        texts[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    colab, button = ("https://colab.research.google.com", "true") if is_settled(url) else ('""', "false")
    for name, key, value in (
        ("_config.yml", "  url", url),
        ("_config.yml", "  colab_url", colab),
        ("_config.yml", "  use_repository_button", button),
        ("_config.yml", "  use_issues_button", button),
        ("CITATION.cff", "repository-code", f'"{url}"'),
    ):
        path = ROOT / name
        text = texts.get(path) or path.read_text(encoding="utf-8")
        texts[path] = re.sub(f"^{key}: .*$", f"{key}: {value}", text, count=1, flags=re.MULTILINE)
    return texts


if __name__ == "__main__":
    for path, text in addressed().items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
