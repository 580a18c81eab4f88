"""What Hopper's machine code says about a kernel with a product: its main loop and its epilogue.

Read from the control flow graph, whose nodes are runs of instructions that are left at the end
alone. All counts are instructions that one warp issues.

* The main loop is the innermost loop that holds HGMMA, the instruction of the matrix unit. A step
  of it, one piece of the summed axis, is the shortest way around it: the longer ones try again
  until a copy has arrived. The assembler may unroll it, so that one round is several steps: as many
  as its HGMMA hold those of one step of the loop in Triton's last form.
* The epilogue is the longest way from the main loop's exit to the tile's end. That is the program's
  end or, where a program walks over tiles, the way back to the next tile. Kernels have it twice: at
  a branch after the loop, tiles with a target or a ragged end (`marked`) go one way, all others the
  other. The marked copy is the longer one.
* A kernel is flattened where the innermost loop that holds HGMMA also stores results and starts
  copies: so the next tile's copies run during the epilogue, which is then the longest way around
  the loop less the shortest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Set
from functools import cache
from typing import NamedTuple

MATRIX = re.compile(r"\bHGMMA\.(\d+)x(\d+)x(\d+)")
COPY = re.compile(r"\bUTMALDG|\bLDGSTS")
STORE = re.compile(r"\bSTG|\bUTMASTG|\bRED[G.]|\bATOMG|\bUTMAREDG")
DOT = re.compile(r"ttng\.warp_group_dot [^:]*: [^<]*<(\d+)x(\d+)x[^*]*\* [^<]*<\d+x(\d+)x")
COPIES = 100  # instructions that each of two ways has where they are two copies of an epilogue


class Loop(NamedTuple):
    step: float  # instructions
    epilogue: int  # instructions of the usual tile
    epilogue_marked: int | None  # None: the kernel has one epilogue
    flattened: bool


class Block(NamedTuple):
    code: list[str]
    next: list[int]


class Graph:
    """Blocks, the entry first, with the edges that close loops set apart."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.back = back_edges(blocks)

    def forward(self, node: int) -> list[int]:
        return [child for child in self.blocks[node].next if (node, child) not in self.back]

    def ends(self) -> set[int]:
        """Blocks that end the program, or go back to the next tile."""
        return {i for i, block in enumerate(self.blocks) if block.code and not self.forward(i)}

    def reachable(self, node: int) -> set[int]:
        """From a node on, itself included, without closing a loop."""
        found, todo = {node}, [node]
        while todo:
            new = set(self.forward(todo.pop())) - found
            found |= new
            todo += new
        return found

    def way(self, start: int, best: Callable, ends: Set[int], avoid: Set[int] = frozenset()) -> int:
        """Instructions on the longest (max) or shortest (min) way from `start` to one of `ends`."""

        @cache
        def rest(node: int) -> float:
            own = len(self.blocks[node].code)
            if node in ends:
                return own
            ways = [rest(child) for child in self.forward(node) if child not in avoid]
            ways = [length for length in ways if math.isfinite(length)]
            return own + best(ways) if ways else math.inf

        return int(rest(start))

    def holds(self, nodes: Iterable[int], pattern: re.Pattern) -> list[re.Match]:
        code = (line for node in sorted(nodes) for line in self.blocks[node].code)
        return [found for found in map(pattern.search, code) if found]


def main_loop(code: str, ttgir: str, num_warps: int) -> Loop | None:
    """Of `nvdisasm -c`, with Triton's last intermediate form. None without such a loop."""
    graph = Graph(basic_blocks(code))
    loops = [(edge, natural_loop(graph.blocks, edge)) for edge in graph.back]
    loops = [(edge, nodes) for edge, nodes in loops if graph.holds(nodes, MATRIX)]
    inner = [x for x in loops if not any(other < x[1] for _, other in loops)]
    read = [_read(graph, *x, steps_of(graph, x[1], ttgir, num_warps)) for x in inner]
    found = [loop for loop in read if loop is not None]
    return max(found, key=lambda loop: loop.epilogue, default=None)


def steps_of(graph: Graph, nodes: Set[int], ttgir: str, num_warps: int) -> float:
    """Steps in one round of a loop: its HGMMA over those of a step of Triton's own loop."""
    matrix = graph.holds(nodes, MATRIX)
    m, n, k = map(int, matrix[0].groups())
    warpgroups = num_warps // 4  # each issues HGMMA of its own
    return len(matrix) * m * n * k * warpgroups / step_size(ttgir)


def step_size(ttgir: str) -> int:
    """Multiply-adds of one step: of the largest loop's products, which may come piece by piece."""
    found, loops = 1, []  # [indentation, multiply-adds] of the loops that a line is within
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        while loops and indent <= loops[-1][0]:
            found = max(found, loops.pop()[1])
        if "scf.for" in line or "scf.while" in line:
            loops.append([indent, 0])
        elif loops and (product := DOT.search(line)):
            loops[-1][1] += math.prod(map(int, product.groups()))
    return found


def _read(graph: Graph, edge: tuple[int, int], nodes: Set[int], steps: float) -> Loop | None:
    last, first = edge
    step = graph.way(first, min, {last})
    flattened = bool(graph.holds(nodes, STORE) and graph.holds(nodes, COPY))
    if flattened:
        start, ends, spent = first, {last}, step
    else:
        ends, spent = graph.ends(), 0
        after = {child for node in nodes for child in graph.forward(node)} - nodes
        if not after:  # a walk over tiles whose product takes one step
            return None
        start = max(after, key=lambda node: graph.way(node, max, ends))
    copies = two_copies(graph, start)
    if copies is None:
        return Loop(step / steps, graph.way(start, max, ends) - spent, None, flattened)
    both = [graph.way(start, max, ends, avoid={copy}) - spent for copy in copies]
    return Loop(step / steps, min(both), max(both), flattened)


def two_copies(graph: Graph, start: int) -> tuple[int, int] | None:
    """The two ways on of the branch whose shorter side, up to where they meet, is the longest."""
    best, size = None, COPIES
    for node in graph.reachable(start):
        ways = graph.forward(node)
        if len(ways) != 2:
            continue
        left, right = map(graph.reachable, ways)
        sides = [sum(len(graph.blocks[i].code) for i in x) for x in (left - right, right - left)]
        if min(sides) >= size:
            best, size = (ways[0], ways[1]), min(sides)
    return best


def basic_blocks(code: str) -> list[Block]:
    """The first kernel's, the entry first."""
    starts: dict[str, int] = {}
    pieces: list[list[str]] = [[]]
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            if pieces[-1]:
                pieces.append([])
            starts[label[1]] = len(pieces) - 1
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            pieces[-1].append(found[1])
            if leaves(found[1]):
                pieces.append([])
    blocks = []
    for index, piece in enumerate(pieces):
        after = []
        last = piece[-1] if piece else ""
        goes_on = not re.match(r"EXIT|BRA(\.\w+)* `|RET", last)
        if goes_on and index + 1 < len(pieces):
            after.append(index + 1)
        # BRA.DIV leads to what a warp does whose threads have parted: slow and rare.
        if (target := re.search(r"`\((\.L_\w+)\)", last)) and "BRA.DIV" not in last:
            if leaves(last):
                after.append(starts[target[1]])
        blocks.append(Block(piece, after))
    return blocks


def leaves(instruction: str) -> bool:
    """A thread that ends does not end its warp: EXIT counts where no predicate guards it."""
    return re.match(r"(@!?U?P\d+ )?BRA|EXIT|RET", re.sub(r"\s+", " ", instruction)) is not None


def back_edges(blocks: list[Block]) -> list[tuple[int, int]]:
    """Edges to a node that the walk from the entry is within."""
    edges, state = [], [0] * len(blocks)  # 1: within, 2: done
    stack = [(0, iter(blocks[0].next))]
    state[0] = 1
    while stack:
        node, rest = stack[-1]
        for child in rest:
            if state[child] == 1:
                edges.append((node, child))
            elif state[child] == 0:
                state[child] = 1
                stack.append((child, iter(blocks[child].next)))
                break
        else:
            state[node] = 2
            stack.pop()
    return edges


def natural_loop(blocks: list[Block], edge: tuple[int, int]) -> frozenset[int]:
    """The nodes that reach the edge's start without passing its end."""
    last, first = edge
    before: list[list[int]] = [[] for _ in blocks]
    for node, block in enumerate(blocks):
        for child in block.next:
            before[child].append(node)
    nodes, todo = {first, last}, [last]
    while todo:
        node = todo.pop()
        for parent in before[node] if node != first else ():
            if parent not in nodes:
                nodes.add(parent)
                todo.append(parent)
    return frozenset(nodes)
