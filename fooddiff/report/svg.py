"""Matplotlib's SVG made part of a page: it takes the page's ink and font, and its points tell where they come from."""

import re
from io import StringIO
from xml.etree import ElementTree

import matplotlib as mpl

from fooddiff.report.figures import INK, STYLE, Drawing

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
CLASSES = ("raw", "smooth", "points-")  # ids that the figures give, which become classes
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", XLINK)


def inline(drawing: Drawing) -> str:
    """The drawing as an <svg> element for an HTML page.

    Text stays text, in the page's font; the ink is `currentColor`; ids are unique to the drawing; `raw` and `smooth`
    are classes of curves; every marker of `drawing.titles` has its title.
    """
    buffer = StringIO()
    with mpl.rc_context(STYLE | {"svg.fonttype": "none"}):
        drawing.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        _own(element, drawing.name)
    for group, titles in drawing.titles.items():
        for element in root.iter(f"{{{SVG}}}g"):
            if element.get("class") == group:
                for marker, title in zip(element.iter(f"{{{SVG}}}use"), titles, strict=True):
                    ElementTree.SubElement(marker, f"{{{SVG}}}title").text = title
    for name in ("width", "height"):
        del root.attrib[name]
    root.set("role", "img")
    root.set("aria-label", drawing.alt)
    return ElementTree.tostring(root, encoding="unicode")


def _own(element: ElementTree.Element, prefix: str) -> None:
    """Renames ids and what refers to them, and takes the fonts and the ink out."""
    for name, value in list(element.attrib.items()):
        if name == "id":
            if value.startswith(CLASSES):
                element.set("class", value)
                del element.attrib["id"]
            else:
                element.set("id", f"{prefix}-{value}")
        elif name == f"{{{XLINK}}}href" and value.startswith("#"):
            element.set(name, f"#{prefix}-{value[1:]}")
        else:
            value = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", value)
            value = re.sub(r"font:\s*([\d.]+px)[^;]*;?", r"font-size: \1;", value)
            element.set(name, value.replace(INK, "currentColor"))
