"""Pages of the API, written from every ``__all__`` before the build begins.

A package gets a page with its names; each of its modules that has some of them gets one
page, as a module is one algorithm: first what the module says, where the equations are,
then the names at their public home. Modules that the text refers to and that have no
public name follow under "Inside".
"""

import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

from sphinx.addnodes import desc_signature
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode

import pyro_ebm

FOLDER = "api/generated"


def write_pages(app):
    folder = Path(app.srcdir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    pages = {}
    for name in app.config.api_packages:
        pages |= package_pages(name)
    for path in folder.iterdir():
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def package_pages(name):
    """Pages of one package or module of the library: file name and text."""
    package = importlib.import_module(f"pyro_ebm.{name}")
    lines = [*title(name), *module_docstring(package), *name_table(package)]
    pages, stems, inner = {}, [], []
    for module in modules(package):
        stem = module.__name__.removeprefix("pyro_ebm.")
        pages[f"{stem}.rst"] = text = module_page(module, package)
        found = stems if public_names(module, package) else inner
        found.append((text.partition("\n")[0].lower(), stem))  # sorted by title
    lines += toctree("Modules", stems) + toctree("Inside", inner)
    if not pages:
        for public in package.__all__:
            lines += directive(package, public)
    return {f"{name}.rst": "\n".join(lines) + "\n", **pages}


def public_names(module, package):
    """What a package lists of what a module defines, and perhaps the module itself."""
    itself = [name for name in package.__all__ if getattr(package, name) is module]
    return itself + [name for name in package.__all__ if name in module.__all__]


def modules(package):
    """The modules of a package and of its folders, in the order of the alphabet."""
    prefix = f"{package.__name__}."
    found = pkgutil.walk_packages(getattr(package, "__path__", []), prefix)
    for name in sorted(info.name for info in found):
        module = importlib.import_module(name)
        if module.__all__:  # a folder alone has no page
            yield module


def module_page(module, package):
    """What a module says, then its names: the public ones at their public home."""
    names = public_names(module, package)
    short = ", ".join(names) if 0 < len(names) <= 3 else module.__name__.split(".")[-1]
    lines = [*title(short), *module_docstring(module)]
    public = [name for name in names if name in module.__all__]
    for name in public:
        lines += directive(package if is_defined(package, name) else module, name)
    inner = [name for name in module.__all__ if name not in public]
    if hasattr(module, "__path__"):  # the names are on the pages of its modules
        inner = []
    if public and inner:
        lines += heading("Inside")
    for name in inner:
        lines += directive(module, name)
    return "\n".join(lines) + "\n"


def is_defined(package, name):
    """Whether a name is a class or a function, not an alias of a type."""
    return inspect.isroutine(value := getattr(package, name)) or isinstance(value, type)


def module_docstring(module):
    # A function may have the name of its module, so that modules stay out of the index.
    return [f".. automodule:: {module.__name__}", "   :no-index:", ""]


def directive(module, name):
    """What documents one name."""
    value, full = getattr(module, name), f"{module.__name__}.{name}"
    if not isinstance(value, type):
        is_function = inspect.isroutine(value)
        return [f".. auto{'function' if is_function else 'data'}:: {full}", ""]
    lines = [f".. autoclass:: {full}", "   :members:", "   :show-inheritance:"]
    fields = getattr(value, "_fields", ())  # a NamedTuple's, which its docstring has
    if fields:
        lines.append(f"   :exclude-members: {', '.join(fields)}")
    return [*lines, ""]


def name_table(package):
    """The names of ``__all__`` with the first line of what each says of itself."""
    lines = [".. list-table::", "   :widths: 35 65", "   :class: names", ""]
    for name in package.__all__:
        value = getattr(package, name)
        role, target, text = ":py:obj:", f"{package.__name__}.{name}", value.__doc__
        if isinstance(value, ModuleType):
            role, target = ":doc:", value.__name__.removeprefix("pyro_ebm.")
        elif not is_defined(package, name):
            [home] = [m for m in modules(package) if name in m.__all__]
            target = f"{home.__name__}.{name}"
            comments = ModuleAnalyzer.for_module(home.__name__).find_attr_docs()
            text = "\n".join(comments["", name])
        summary = inspect.cleandoc(text).partition("\n\n")[0]
        lines += [f"   * - {role}`{name} <{target}>`"]
        lines += [f"     - {' '.join(summary.split())}"]
    return [*lines, ""]


def toctree(caption, titles_and_stems):
    if not titles_and_stems:
        return []
    lines = [*heading(caption), ".. toctree::", "   :maxdepth: 1", ""]
    return [*lines, *(f"   {stem}" for _, stem in sorted(titles_and_stems)), ""]


def title(text):
    return [text, "=" * len(text), ""]


def heading(text):
    return [text, "-" * len(text), ""]


def resolve(app, env, node, contnode):
    """Find what a docstring names as its own module does, and modules by their page."""
    if node.get("refdomain") != "py":
        return None
    target, here = node["reftarget"], node["refdoc"]
    page = f"{FOLDER}/{target.removeprefix('pyro_ebm.')}"
    if node["reftype"] == "mod" and page in env.found_docs:
        return make_refnode(app.builder, here, page, "", contnode)
    domain = env.get_domain("py")
    for full in candidates(target, node.get("py:module") or ""):
        if full in domain.objects:
            return domain.resolve_xref(
                env, here, app.builder, "obj", full, node, contnode
            )
    return None


def candidates(target, module):
    """Full names that ``target`` may mean in a module: the public homes of a name."""
    parts = target.split(".")
    if target.startswith("pyro_ebm."):
        yield ".".join([*parts[:2], parts[-1]])  # pyro_ebm.mcmc.base.Kernel
        value = getattr(pyro_ebm, parts[1], None)  # pyro_ebm.EnergyModel.averaged
        if not isinstance(value, ModuleType) and value is not None:
            package = value.__module__.split(".")[1]
            yield ".".join(["pyro_ebm", package, *parts[1:]])
        return
    package = ".".join(module.split(".")[:2])
    yield f"{package}.{target}"
    yield f"pyro_ebm.{target}"


def drop_repeated(app, domain, objtype, content):
    """A function with a version for each type is written once, not once for each."""
    seen = set()
    for signature in list(content.parent.findall(desc_signature)):
        if signature.parent is content.parent:
            if (text := signature.astext()) in seen:
                signature.parent.remove(signature)
            seen.add(text)


def hide_factories(app, what, name, value, options, signature, returns):
    """A default that is made anew is told by the text; its signature has no name."""
    return (signature or "").replace("<factory>", "...") or None, returns


def show_public_bases(app, name, value, options, bases):
    """In the place of a private base, a private home of shared code, stand its own."""
    for number, base in reversed(list(enumerate(bases))):
        if getattr(base, "__name__", "").startswith("_"):
            bases[number : number + 1] = base.__bases__


def setup(app):
    app.setup_extension("sphinx.ext.autodoc")  # whose event this listens to
    app.add_config_value("api_packages", list(pyro_ebm.__all__), "env", types=[list])
    app.connect("builder-inited", write_pages)
    app.connect("missing-reference", resolve)
    app.connect("object-description-transform", drop_repeated)
    app.connect("autodoc-process-signature", hide_factories)
    app.connect("autodoc-process-bases", show_public_bases)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
