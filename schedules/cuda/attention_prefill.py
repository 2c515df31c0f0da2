"""Prefill attention on a GPU: many queries of a sequence, against new keys or the paged cache.

Flash attention on tensor cores: a block takes 64 query rows (a row is one token and one of the
query heads that share a key/value head), a warp 16 of them, and walks over the keys 32 at a time
with a running softmax. Queries, keys, weights and values are halves, all sums float32.
"""

from __future__ import annotations

from typing import Any

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.attention_common import (
    NewKeys,
    PagedKeys,
    first_unseen,
    magnitude,
)
from gqsa_compiler.schedules.cuda.device import (
    SharedMemory,
    barrier,
    device_call,
    do,
    register,
    registers,
    shuffle_xor,
    u32,
)
from gqsa_compiler.schedules.cuda.kv_cache import HALVES, pages_argument
from gqsa_compiler.schedules.cuda.launch import Thread, i32
from gqsa_compiler.schedules.generic.attention_common import (
    MASKED,
    AttentionShape,
    rope_arguments,
    table_argument,
)
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    argument,
    const,
    extent,
    load,
    scalar,
    scheduled,
    store,
)

_WARPS = 4
_THREADS = _WARPS * WARP
_ROWS = 16 * _WARPS
_KEYS = 32
_M, _N, _K = 16, 8, 16  # of one mma


def attention_prefill(shape: AttentionShape, paged: bool) -> Any:
    """Build the kernel that TVM's paged cache calls for several queries a sequence.

    Arguments are those of `schedules.generic.attention_prefill.attention_prefill`, but queries,
    keys, values and the output are float16. The positions of a sequence's queries ascend.
    """
    return _paged(shape) if paged else _ragged(shape)


def _ragged(shape: AttentionShape) -> Any:
    batch, tokens, new = (extent(name, "int32") for name in ("batch", "n", "new_keys"))
    with scheduled() as builder:
        q = argument("q", (tokens, shape.num_heads, shape.head_dim), "float16")
        q_indptr = table_argument("q_indptr", batch + 1)
        k = argument("k", (new, shape.num_kv_heads, shape.head_dim), "float16")
        v = argument("v", (new, shape.num_kv_heads, shape.head_dim), "float16")
        kv_indptr = table_argument("kv_indptr", batch + 1)
        position = table_argument("position", tokens)
        offset = table_argument("offset", batch)

        def keys_of(b: Expr, head: Expr) -> tuple[Expr, NewKeys]:
            begin = B.bind(load(kv_indptr, b))
            count = B.bind(load(kv_indptr, b + i32(1)) - begin)
            return count, NewKeys(k, v, begin, head)

        _launch(shape, q, q_indptr, position, offset, keys_of)
    return builder.get()


def _paged(shape: AttentionShape) -> Any:
    batch, tokens, used = (extent(name, "int32") for name in ("batch", "n", "used_pages"))
    with scheduled() as builder:
        q = argument("q", (tokens, shape.num_heads, shape.head_dim), "float16")
        q_indptr = table_argument("q_indptr", batch + 1)
        pages = pages_argument(shape)
        page_indptr = table_argument("page_indptr", batch + 1)
        page_values = table_argument("page_values", used)
        length = table_argument("length", batch)
        offset = table_argument("offset", batch)
        position = table_argument("position", tokens)

        def keys_of(b: Expr, head: Expr) -> tuple[Expr, PagedKeys]:
            begin = B.bind(load(page_indptr, b))
            count = B.bind(load(page_indptr, b + i32(1)) - begin)
            filled = (count - i32(1)) * i32(shape.page_size) + load(length, b)
            many = B.bind(B.Select(count > i32(0), filled, i32(0)))
            return many, PagedKeys(shape, pages, page_values, begin, head)

        _launch(shape, q, q_indptr, position, offset, keys_of)
    return builder.get()


def _launch(
    shape: AttentionShape,
    q: Buffer,
    q_indptr: Buffer,
    position: Buffer,
    offset: Buffer,
    keys_of: Any,
) -> None:
    """Declare the arguments that are last in both kernels, and emit the launch."""
    tokens = q.shape[0]
    batch = offset.shape[0]
    output = argument("output", (tokens, shape.num_heads, shape.head_dim), "float16")
    lse = argument("lse", (tokens, shape.num_heads))
    causal = scalar("causal", "int32")
    sm_scale = rope_arguments()
    # Every sequence may leave one tile partly empty; blocks beyond the last tile have no work.
    most = B.floordiv(tokens * i32(shape.group), i32(_ROWS)) + batch
    with (
        B.thread_binding(0, most, thread="blockIdx.x") as tile,
        B.thread_binding(0, shape.num_kv_heads, thread="blockIdx.y") as head,
        B.thread_binding(0, _THREADS, thread="threadIdx.x") as thread,
    ):
        tile, head = B.bind(B.Cast("int32", tile)), B.bind(B.Cast("int32", head))
        place = _find_tile(shape, q_indptr, batch, tile)
        b, row0 = B.bind(load(place, 0)), B.bind(load(place, 1))
        with B.If(b >= i32(0)), B.Then():
            begin = B.bind(load(q_indptr, b))
            rows = B.bind((load(q_indptr, b + i32(1)) - begin) * i32(shape.group))
            count, source = keys_of(b, head)
            block = _Block(shape, source, Thread.of(thread), begin, row0, rows, head)
            base = B.bind(load(offset, b))
            block.look(position, base, count, causal, sm_scale)
            block.load_queries(q)
            block.walk(count, magnitude(sm_scale))
            block.store(output, lse)


def _find_tile(shape: AttentionShape, q_indptr: Buffer, batch: Expr, tile: Expr) -> Buffer:
    """Emit the search for a tile: int32 [2], its sequence (-1: none) and its first row there."""
    found = registers(3, "int32")
    for i, value in enumerate((-1, 0, 0)):
        store(found, i32(value), i)
    with B.serial(batch) as b:
        rows = (load(q_indptr, b + i32(1)) - load(q_indptr, b)) * i32(shape.group)
        own = B.bind(B.floordiv(rows + i32(_ROWS - 1), i32(_ROWS)))
        before = B.bind(load(found, 2))
        with B.If(B.And(tile >= before, tile < before + own)), B.Then():
            store(found, b, 0)
            store(found, (tile - before) * i32(_ROWS), 1)
        store(found, before + own, 2)
    return found


class _Block:
    """A block's rows; methods emit code for one thread.

    Of a warp's 16 rows a thread has the results of rows ``lane / 4`` and 8 further on, in columns
    ``2 (lane % 4)`` and the next of every 8 (PTX ISA, "mma.m16n8k16").
    """

    def __init__(
        self,
        shape: AttentionShape,
        source: NewKeys | PagedKeys,
        thread: Thread,
        begin: Expr,
        row0: Expr,
        rows: Expr,
        head: Expr,
    ) -> None:
        self.shape, self.source, self.thread = shape, source, thread
        self.begin, self.row0, self.rows, self.head = begin, row0, rows, head
        self.padded = -(-shape.head_dim // _K) * _K
        self.stride = self.padded // 2 + 4  # words, of a row in shared memory: four banks further
        parts = {"queries": _ROWS * self.stride, "keys": _KEYS * self.stride}
        shared = SharedMemory.allocate({**parts, "values": _KEYS * self.stride})
        self.queries = shared.part("queries", "uint32")
        self.keys, self.values = shared.part("keys", "uint32"), shared.part("values", "uint32")
        self.down = B.bind(B.floordiv(thread.lane, i32(4)))
        self.right = B.bind(B.floormod(thread.lane, i32(4)))
        self.features = shape.head_dim // _N
        self.out = registers(self.features * 4)
        self.scores = registers(_KEYS // _N * 4)
        self.top, self.total = registers(2), registers(2)
        self.low, self.high = registers(2, "int32"), registers(2, "int32")
        self.bounds = registers(2, "int32")

    def _row(self, half: int) -> Expr:
        """Emit one of the thread's two rows within the sequence."""
        return self.row0 + self.thread.warp * i32(_M) + self.down + i32(8 * half)

    def _token_and_head(self, row: Expr) -> tuple[Expr, Expr]:
        group = i32(self.shape.group)
        token = B.bind(self.begin + B.floordiv(row, group))
        return token, B.bind(self.head * group + B.floormod(row, group))

    def look(self, position: Buffer, base: Expr, count: Expr, causal: Expr, sm_scale: Expr) -> None:
        """Emit which keys the thread's rows see, and which any row of the block does."""

        def sees(row: Expr) -> tuple[Expr, Expr]:
            last = B.bind(B.min(row, self.rows - i32(1)))
            token, _ = self._token_and_head(last)
            place = B.bind(load(position, token) - base)
            until = B.Select(causal > i32(0), place, count)
            low = first_unseen(self.shape, sm_scale, place)
            return low, B.bind(B.min(until, count - i32(1)))

        for half in range(2):
            low, high = sees(self._row(half))
            store(self.low, low, half)
            store(self.high, high, half)
        first, _ = sees(self.row0)
        _, last = sees(self.row0 + i32(_ROWS - 1))
        store(self.bounds, B.floordiv(B.max(first + i32(1), i32(0)), i32(_KEYS)), 0)
        store(self.bounds, B.floordiv(last + i32(_KEYS), i32(_KEYS)), 1)

    def _fill(self, target: Buffer, rows: int, there: Any, value: Any) -> None:
        """Emit the load of rows of halves to shared memory; zeros where nothing is."""
        chunks = self.padded // HALVES
        count = rows * chunks
        with B.serial(-(-count // _THREADS)) as i:
            number = B.bind(i * i32(_THREADS) + self.thread.number)
            with B.If(number < i32(count)), B.Then():
                row = B.bind(B.floordiv(number, i32(chunks)))
                feature = B.bind(B.floormod(number, i32(chunks)) * i32(HALVES))
                halves = registers(HALVES, "float16")
                for j in range(HALVES):
                    store(halves, const(0.0, "float16"), j)
                known = B.And(there(row), feature < i32(self.shape.head_dim))
                with B.If(known), B.Then():
                    store(halves, value(row, feature), i32(0), lanes=HALVES)
                words = B.decl_buffer((HALVES // 2,), "uint32", data=halves.data, scope="local")
                to = row * i32(self.stride) + B.floordiv(feature, i32(2))
                store(target, load(words, i32(0), lanes=HALVES // 2), B.bind(to), lanes=4)

    def load_queries(self, q: Buffer) -> None:
        """Emit the load of the block's queries; the barrier after the first keys covers it."""

        def value(row: Expr, feature: Expr) -> Expr:
            token, head = self._token_and_head(self.row0 + row)
            return load(q, token, head, feature, lanes=HALVES)

        self._fill(self.queries, _ROWS, lambda row: self.row0 + row < self.rows, value)

    def walk(self, count: Expr, scale: Expr) -> None:
        """Emit the pass over the keys."""
        for i in range(self.features * 4):
            store(self.out, const(0.0, "float32"), i)
        for half in range(2):
            store(self.top, const(MASKED, "float32"), half)
            store(self.total, const(0.0, "float32"), half)
        start, stop = B.bind(load(self.bounds, 0)), B.bind(load(self.bounds, 1))
        with B.serial(B.max(stop - start, i32(0))) as step:
            first = B.bind((start + step) * i32(_KEYS))
            for kind, target in enumerate((self.keys, self.values)):
                self._load_keys(kind, target, first, count)
            barrier()
            self._multiply_keys()
            self._weigh(first, scale)
            self._multiply_values()
            barrier()

    def _load_keys(self, kind: int, target: Buffer, first: Expr, count: Expr) -> None:
        def value(row: Expr, feature: Expr) -> Expr:
            return self.source.load(kind, first + row, feature, HALVES)

        self._fill(target, _KEYS, lambda row: first + row < count, value)

    def _mma(self, sums: Buffer, at: int, a: list[Expr], b: list[Expr]) -> None:
        to = sums.access_ptr("rw", offset=at)
        do(device_call("gqsa_mma", "void", to, *a, *b))

    def _multiply_keys(self) -> None:
        """Emit the scores of 16 rows and all keys of the step."""
        for i in range(_KEYS // _N * 4):
            store(self.scores, const(0.0, "float32"), i)
        rows = B.bind((self.thread.warp * i32(_M) + self.down) * i32(self.stride) + self.right)
        keys = B.bind(self.down * i32(self.stride) + self.right)
        with B.serial(self.padded // _K) as step:
            column = B.bind(step * i32(_K // 2))
            a = registers(4, "uint32")
            for i, (down, right) in enumerate(((0, 0), (8, 0), (0, 4), (8, 4))):
                at = rows + column + i32(down * self.stride + right)
                store(a, load(self.queries, at), i)
            for n in range(_KEYS // _N):
                b = registers(2, "uint32")
                for i in range(2):
                    at = keys + column + i32(n * _N * self.stride + 4 * i)
                    store(b, load(self.keys, at), i)
                operands = [load(a, i) for i in range(4)]
                self._mma(self.scores, 4 * n, operands, [load(b, i) for i in range(2)])

    def _weigh(self, first: Expr, scale: Expr) -> None:
        """Emit the running softmax: scores become weights, earlier sums are scaled down."""
        masked, zero = const(MASKED, "float32"), const(0.0, "float32")
        for half in range(2):
            best = register(load(self.top, half), "float32")
            low, high = B.bind(load(self.low, half)), B.bind(load(self.high, half))
            for n in range(_KEYS // _N):
                for i in range(2):
                    at = 4 * n + 2 * half + i
                    key = B.bind(first + i32(n * _N + i) + self.right * i32(2))
                    seen = B.And(key > low, key <= high)
                    score = B.bind(B.Select(seen, load(self.scores, at) * scale, masked))
                    store(self.scores, score, at)
                    store(best, B.max(load(best, 0), score), 0)
            for lanes in (1, 2):
                mine = B.bind(load(best, 0))
                store(best, B.max(mine, shuffle_xor(mine, lanes)), 0)
            top = B.bind(load(best, 0))
            factor = B.bind(T.exp2(load(self.top, half) - top))
            store(self.top, top, half)
            total = register(load(self.total, half) * factor, "float32")
            for n in range(_KEYS // _N):
                for i in range(2):
                    at = 4 * n + 2 * half + i
                    score = B.bind(load(self.scores, at))
                    seen = score > const(MASKED / 2, "float32")
                    weight = B.bind(B.Select(seen, T.exp2(score - top), zero))
                    store(self.scores, weight, at)
                    store(total, load(total, 0) + weight, 0)
            store(self.total, load(total, 0), half)
            for f in range(self.features):
                for i in range(2):
                    at = 4 * f + 2 * half + i
                    store(self.out, load(self.out, at) * factor, at)

    def _multiply_values(self) -> None:
        """Emit the sums of weighted values: the weights stay in the registers they are in."""
        halves = B.decl_buffer(
            (2 * _KEYS * self.stride,), "uint16", data=self.values.data,
            elem_offset=2 * self.values.elem_offset, scope="shared.dyn",
        )  # fmt: skip
        stride = 2 * self.stride
        for step in range(_KEYS // _K):
            a = registers(4, "uint32")
            for i, (tile, half) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
                at = 4 * (2 * step + tile) + 2 * half
                pair = (load(self.scores, at), load(self.scores, at + 1))
                store(a, device_call("gqsa_half2", "uint32", *pair), i)
            key = B.bind((i32(step * _K) + self.right * i32(2)) * i32(stride) + self.down)
            for f in range(self.features):
                b = registers(2, "uint32")
                for i in range(2):
                    at = key + i32(8 * i * stride + f * _N)
                    first = B.Cast("uint32", load(halves, at))
                    second = B.Cast("uint32", load(halves, at + i32(stride)))
                    store(b, B.bitwise_or(first, B.shift_left(second, u32(16))), i)
                operands = [load(a, i) for i in range(4)]
                self._mma(self.out, 4 * f, operands, [load(b, i) for i in range(2)])

    def store(self, output: Buffer, lse: Buffer) -> None:
        """Emit the division by the sums of weights, and the stores."""
        for half in range(2):
            total = register(load(self.total, half), "float32")
            for lanes in (1, 2):
                mine = B.bind(load(total, 0))
                store(total, mine + shuffle_xor(mine, lanes), 0)
            sees = B.bind(load(total, 0) > const(0.0, "float32"))
            safe = B.bind(B.Select(sees, load(total, 0), const(1.0, "float32")))
            row = B.bind(self._row(half))
            with B.If(row < self.rows), B.Then():
                token, head = self._token_and_head(row)
                for f in range(self.features):
                    for i in range(2):
                        feature = i32(f * _N + i) + self.right * i32(2)
                        value = load(self.out, 4 * f + 2 * half + i) / safe
                        store(output, B.Cast("float16", value), token, head, feature)
                with B.If(self.right == i32(0)), B.Then():
                    known = load(self.top, half) + T.log2(safe)
                    masked = const(MASKED, "float32")
                    store(lse, B.Select(sees, known, masked), token, head)
