"""Pages of one cache for many requests: who has which, and a tree of those whose content may be shared.

A page that is completely written is found again by the token ids of it and of all before it. Each page is free, or used
by one or more requests, or idle: written, used by nobody, kept until another needs the memory.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ktcompile.symbols import PAGE


@dataclass(eq=False)
class Node:
    """A written page in the tree: its token ids are the key by which its parent has it."""

    page: int
    key: tuple[int, ...]
    parent: "Node | None"
    children: "dict[tuple[int, ...], Node]" = field(default_factory=dict)


@dataclass(eq=False)
class Table:
    """The pages of one request, in order. The first `kept` are in the tree, the last of these is `node`'s.

    `pages` is only appended to; where a page is exchanged it becomes another list.
    """

    node: Node
    pages: list[int] = field(default_factory=list)
    kept: int = 0


class Pages:
    """`total` pages, numbered from 0. Not for several threads."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.root = Node(-1, (), None)
        self.free = list(reversed(range(total)))
        self.uses = [0] * total
        self.nodes: dict[int, Node] = {}  # of the pages in the tree
        # Least recently used first. Who uses a page uses those before it, and gives the last one back first: a child
        # is always ahead of its parent here.
        self.idle: OrderedDict[Node, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be had now."""
        return len(self.free) + len(self.idle)

    @property
    def used(self) -> int:
        """Pages that a request has."""
        return self.total - self.available

    def table(self) -> Table:
        """Of a new request."""
        return Table(self.root)

    def grow(self, table: Table, tokens: int) -> bool:
        """Add pages until it holds so many tokens. False, with as many added as there were, when pages run out."""
        while len(table.pages) * PAGE < tokens:
            if not self.available:
                return False
            page = self.free.pop() if self.free else self._evict()
            self.uses[page] = 1
            table.pages.append(page)
        return True

    def adopt(self, table: Table, tokens: Sequence[int]) -> int:
        """Add the pages of the tree that begin like `tokens`, all but the last of these at most; how many pages.

        All pages of the table must be in the tree.
        """
        before = table.kept
        for node in self._path(table.node, tokens, before):
            self._use(node)
            table.pages.append(node.page)
            table.node, table.kept = node, table.kept + 1
        return table.kept - before

    def in_use(self, tokens: Sequence[int]) -> int:
        """How many of the pages that a new request of these tokens would adopt are used now."""
        return sum(self.uses[node.page] > 0 for node in self._path(self.root, tokens, 0))

    def keep(self, table: Table, tokens: Sequence[int], stored: int) -> None:
        """The first `stored` of `tokens` are written: pages full of them come into the tree.

        Where the tree has such a page already, the table takes that one and gives its own back.
        """
        while (end := (table.kept + 1) * PAGE) <= stored:
            key = tuple(tokens[end - PAGE : end])
            page, node = table.pages[table.kept], table.node.children.get(key)
            if node is None:
                node = table.node.children[key] = self.nodes[page] = Node(page, key, table.node)
            else:
                self._use(node)
                table.pages = [*table.pages[: table.kept], node.page, *table.pages[table.kept + 1 :]]
                self._give_back(page)
            table.node, table.kept = node, table.kept + 1

    def release(self, table: Table) -> None:
        """The request has no pages any more. Those in the tree stay there, idle."""
        for page in reversed(table.pages):
            self._give_back(page)
        table.pages, table.kept, table.node = [], 0, self.root

    def forget(self) -> None:
        """Free every idle page."""
        while self.idle:
            self.free.append(self._evict())

    def _path(self, node: Node, tokens: Sequence[int], depth: int) -> Iterator[Node]:
        for end in range((depth + 1) * PAGE, len(tokens), PAGE):
            child = node.children.get(tuple(tokens[end - PAGE : end]))
            if child is None:
                return
            yield child
            node = child

    def _use(self, node: Node) -> None:
        self.idle.pop(node, None)
        self.uses[node.page] += 1

    def _give_back(self, page: int) -> None:
        self.uses[page] -= 1
        if self.uses[page]:
            return
        if page in self.nodes:
            self.idle[self.nodes[page]] = None
        else:
            self.free.append(page)

    def _evict(self) -> int:
        node, _ = self.idle.popitem(last=False)
        assert node.parent is not None and not node.children
        del node.parent.children[node.key], self.nodes[node.page]
        return node.page

    def check(self, tables: Sequence[Table]) -> None:
        """AssertionError unless every page is where it should be, `tables` being all there are."""
        uses = [0] * self.total
        for table in tables:
            assert table.kept <= len(table.pages)
            node: Node | None = table.node
            for page in reversed(table.pages[: table.kept]):
                assert node is not None and node.page == page
                node = node.parent
            assert node is self.root
            for page in table.pages:
                uses[page] += 1
        assert uses == self.uses
        assert all(count <= 1 or page in self.nodes for page, count in enumerate(uses)), (
            "a page that is written is shared"
        )
        idle = {page for page in self.nodes if not uses[page]}
        assert idle == {node.page for node in self.idle}
        assert sorted(self.free) == [p for p in range(self.total) if not uses[p] and p not in self.nodes]
        seen: set[int] = set()
        for node in self.idle:
            seen.add(node.page)
            assert all(child.page in seen for child in node.children.values()), "a parent would go before its child"


__all__ = ["Node", "Pages", "Table"]
