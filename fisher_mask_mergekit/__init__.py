"""Merging of fine-tuned Transformers by the Fisher information of mask nodes.

Importing this package loads nothing heavy. It makes mergekit know the merge method ``fisher_mask``,
at once if mergekit is loaded already, else as soon as it is. The same happens without this import
where torch loads the package's entry point.

Reference: "Fisher Mask Nodes for Language Model Merging", arXiv 2403.09891.
"""

from fisher_mask_mergekit.autoload import install

__version__ = "0.1.0"
__all__ = ["__version__"]

install()
