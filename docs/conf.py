"""Settings of Sphinx. ``make docs`` builds the site without a network.

The formulas are set in the reader's browser by MathJax. It comes from the package
``sphinx-mathjax-offline``, not from a CDN, so that the site can be read offline too.
"""

import os
import sys
from pathlib import Path

# Every page runs in a kernel of its own, which inherits these: one thread, as there may
# be as many kernels as cores, pictures in the style of the site, no bars of slow draws.
DOCS = Path(__file__).resolve().parent
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MATPLOTLIBRC"] = str(DOCS / "matplotlibrc")
os.environ["TQDM_DISABLE"] = "1"
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm without ipywidgets

sys.path.insert(0, str(DOCS / "_ext"))

from nbclient import NotebookClient  # noqa: E402

import pyro_ebm  # noqa: E402

# The kernels' notice that they listen to this machine in the clear is no news here.
NotebookClient.extra_arguments.default_args = (["--log-level=40"],)

project = "pyro_ebm"
author = "The pyro_ebm developers"
project_copyright = author
version = release = pyro_ebm.__version__

extensions = [
    "api_pages",
    "benchmark_tables",
    "mathjax_files",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "_ext", "**.ipynb_checkpoints"]

# Pages: MyST markdown, and every code cell is executed
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
nb_output_stderr = "remove-warn"  # a warning in a page is a warning of the build

# API: what the docstrings say, types beside the arguments
api_packages = [
    "core",
    "energies",
    "mcmc",
    "partition",
    "distributions",
    "infer",
    "bases",
    "diagnostics",
    "datasets",
    "plots",
    "testing",
]
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True  # 2**22, nn.SiLU
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Exactness"]
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# References that lead nowhere are errors, if it is this project that they name, and
# neither private nor a type variable, which has one letter.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!pyro_ebm\b).*|pyro_ebm\..*\.(_\w+|[A-Z])")]

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

math_number_all = False
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"tex": {"macros": {"E": r"\mathbb{E}", "R": r"\mathbb{R}"}}}

html_theme = "furo"
html_title = "pyro_ebm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_domain_indices = False  # the pages of the API are the index of modules
html_show_sphinx = False
pygments_style = "default"  # of a contrast of 4.5 or more, comments included
pygments_dark_style = "monokai"
copybutton_exclude = ".linenos, .gp, .go"
