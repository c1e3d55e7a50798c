"""What an attention block's captured code says of its paged cache and of its rotation: `bind` of mla and gqa."""

from torch import fx

from ktcompile.folding import Site
from ktcompile.graph import argument

NO_PAGES = (
    "it does not write a PagedCache (kernels need its pages; DynamicCache and StaticCache hand keys and values out)"
)


def name_of(node: fx.Node) -> str:
    """The name of what a node calls, without its overload."""
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def named(site: Site, *names: str) -> list[fx.Node]:
    """The nodes of a site that call one of these."""
    return [n for n in site.nodes if name_of(n) in names]


def cache_of(site: Site) -> list[fx.Node] | str:
    """The pool, page table, lengths and query starts of the one ragged cache that a site writes, or why it has none.

    The pool is all that the site changes, and one value all that is read of it outside.
    """
    appends = named(site, "cache_append")
    if len(appends) != 1:
        return NO_PAGES
    if len(site.outputs) != 1:
        return f"{len(site.outputs)} of its values are read outside, wanted 1"
    cache = [argument(appends[0], i) for i in range(4)]
    if not all(n in site.inputs for n in cache):
        return "the cache is not ragged (rectangular batches run the captured code)"
    if set(site.written) != {cache[0]}:
        return "it writes more than its page pool"
    return cache


def rotary_of(site: Site) -> list[fx.Node]:
    """The inputs that a rotary embedding made."""
    return [n for n in site.tensors if any(cls.endswith("RotaryEmbedding") for _, cls in n.meta["stack"])]


def cos_and_sin(rotary: list[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """Of two inputs the cosines, then the sines; None if their names do not tell."""
    sin = next((n for n in rotary if "sin" in n.name), None)
    cos = next((n for n in rotary if n is not sin), None)
    return None if sin is None or cos is None else (cos, sin)
