"""LLVM text of the CPU kernels that run at every token.

A kernel takes the address of int64 arguments: the next row, rows, rows of a block, then what its call of `_frame`
lists. Threads claim blocks of rows with an atomic addition, so one that the machine holds up holds nothing else up.

This file is saved beside exported models.
"""

from __future__ import annotations

from collections.abc import Callable

WORD = 32  # columns of a mask
UNROLLED = 4  # masks of a step


def _frame(names: str, row: str, declarations: str) -> str:
    """The text around a row's: threads claim blocks of rows until none is left."""
    fields = names.split()
    loads = "\n".join(
        f"  %{name}.at = getelementptr i64, ptr %arguments, i64 {number + 3}\n"
        f"  %{name} = load {'ptr' if name.endswith('_p') else 'i64'}, ptr %{name}.at"
        for number, name in enumerate(fields)
    )
    return f"""
{declarations}
define void @kernel(ptr %arguments) nounwind {{
entry:
  %out.at = getelementptr i64, ptr %arguments, i64 1
  %out = load i64, ptr %out.at
  %block.at = getelementptr i64, ptr %arguments, i64 2
  %block = load i64, ptr %block.at
{loads}
  br label %claim
claim:
  %first = atomicrmw add ptr %arguments, i64 %block monotonic
  %some = icmp slt i64 %first, %out
  br i1 %some, label %band, label %done
band:
  %end = add i64 %first, %block
  %inside = icmp slt i64 %end, %out
  %last = select i1 %inside, i64 %end, i64 %out
  br label %row
row:
  %r = phi i64 [ %first, %band ], [ %r.next, %row.end ]
{row}
row.end:
  %r.next = add i64 %r, 1
  %more = icmp slt i64 %r.next, %last
  br i1 %more, label %row, label %claim
done:
  ret void
}}
"""


_OF_ROW = """
  %start.at = getelementptr i32, ptr %starts_p, i64 %r
  %start32 = load i32, ptr %start.at
  %start = sext i32 %start32 to i64
"""
_OF_MASKS = (
    _OF_ROW
    + """
  %values = getelementptr i16, ptr %values_p, i64 %start
  %mask.first = mul i64 %r, %words
  %masks = getelementptr i32, ptr %masks_p, i64 %mask.first
  br label %word
word:
"""
)
_EXPAND = "declare <32 x i16> @llvm.masked.expandload.v32i16(ptr, <32 x i1>, <32 x i16>)\n"
_COUNT = "declare i32 @llvm.ctpop.i32(i32)\n"


def _expanded(unrolled: int, pointer: str) -> str:
    """The text that expands mask number `unrolled` of a step to %v<unrolled> and moves the pointer on."""
    u = unrolled
    return f"""
  %w{u} = add i64 %w, {u}
  %m{u}.at = getelementptr i32, ptr %masks, i64 %w{u}
  %m{u} = load i32, ptr %m{u}.at, align 4
  %k{u} = bitcast i32 %m{u} to <32 x i1>
  %v{u} = call <32 x i16> @llvm.masked.expandload.v32i16(ptr {pointer}, <32 x i1> %k{u}, <32 x i16> zeroinitializer)
  %n{u}.32 = call i32 @llvm.ctpop.i32(i32 %m{u})
  %n{u} = zext i32 %n{u}.32 to i64
  %p{u} = getelementptr i16, ptr {pointer}, i64 %n{u}
  %c{u} = shl i64 %w{u}, 5
"""


def _mask_text(tokens: int) -> str:
    """Masks and packed bfloat16 values: an even column is a word's low half, an odd one its high half."""
    chains = max(1, UNROLLED // tokens)  # sums that do not wait for one another
    names = [(t, chain) for t in range(tokens) for chain in range(chains)]
    now = {at: f"%a{at[0]}.{at[1]}" for at in names}
    body = ""
    for u in range(UNROLLED):
        body += _expanded(u, "%p" if u == 0 else f"%p{u - 1}")
        body += f"""
  %i{u} = bitcast <32 x i16> %v{u} to <16 x i32>
  %even{u}.i = shl <16 x i32> %i{u}, {_all(16, 16)}
  %odd{u}.i = and <16 x i32> %i{u}, {_all(16, -65536)}
  %even{u} = bitcast <16 x i32> %even{u}.i to <16 x float>
  %odd{u} = bitcast <16 x i32> %odd{u}.i to <16 x float>
  %c{u}.odd = add i64 %c{u}, 16"""
        for t in range(tokens):
            at, new = (t, u % chains), f"%a{t}.{u}.new"
            body += f"""
  %xe{t}.{u}.at = getelementptr float, ptr %x{t}, i64 %c{u}
  %xo{t}.{u}.at = getelementptr float, ptr %x{t}, i64 %c{u}.odd
  %xe{t}.{u} = load <16 x float>, ptr %xe{t}.{u}.at, align 4
  %xo{t}.{u} = load <16 x float>, ptr %xo{t}.{u}.at, align 4
  {new}.e = call {_fma(16, f"%xe{t}.{u}", f"%even{u}", now[at])}
  {new} = call {_fma(16, f"%xo{t}.{u}", f"%odd{u}", f"{new}.e")}"""
            now[at] = new
    text = "".join(_input(t) for t in range(tokens)) + _OF_MASKS
    text += "  %w = phi i64 [ 0, %row ], [ %w.next, %word ]\n"
    text += f"  %p = phi ptr [ %values, %row ], [ %p{UNROLLED - 1}, %word ]\n"
    for t, chain in names:
        text += f"  %a{t}.{chain} = phi <16 x float> [ zeroinitializer, %row ], [ {now[t, chain]}, %word ]\n"
    text += f"""{body}
  %w.next = add i64 %w, {UNROLLED}
  %w.more = icmp slt i64 %w.next, %words
  br i1 %w.more, label %word, label %sums
sums:
"""
    for t in range(tokens):
        total = now[t, 0]
        for chain in range(1, chains):
            text += f"  %s{t}.{chain} = fadd <16 x float> {total}, {now[t, chain]}\n"
            total = f"%s{t}.{chain}"
        text += _stored(t, total, 16)
    text += "  br label %row.end"
    return _frame(
        "words masks_p values_p starts_p x_p x_stride y_p", text, _EXPAND + _COUNT + _arithmetic(16)
    )


def _all(lanes: int, value: int) -> str:
    return "<" + ", ".join([f"i32 {value}"] * lanes) + ">"


def _fma(lanes: int, a: str, b: str, c: str) -> str:
    kind = f"<{lanes} x float>"
    return f"{kind} @llvm.fma.v{lanes}f32({kind} {a}, {kind} {b}, {kind} {c})"


def _arithmetic(lanes: int) -> str:
    kind = f"<{lanes} x float>"
    return (
        f"declare {kind} @llvm.fma.v{lanes}f32({kind}, {kind}, {kind})\n"
        f"declare float @llvm.vector.reduce.fadd.v{lanes}f32(float, {kind})\n"
    )


def _input(t: int) -> str:
    return f"""
  %x{t}.first = mul i64 %x_stride, {t}
  %x{t} = getelementptr float, ptr %x_p, i64 %x{t}.first"""


def _stored(t: int, total: str, lanes: int) -> str:
    return f"""
  %y{t} = call reassoc float @llvm.vector.reduce.fadd.v{lanes}f32(float 0.0, <{lanes} x float> {total})
  %y{t}.first = mul i64 %out, {t}
  %y{t}.number = add i64 %y{t}.first, %r
  %y{t}.at = getelementptr float, ptr %y_p, i64 %y{t}.number
  store float %y{t}, ptr %y{t}.at
"""


def _expand_text(tokens: int) -> str:
    """Rows `row0` and on: dense bfloat16 rows of words * 32 columns."""
    text = _OF_MASKS.replace("%r\n", "%row.number\n").replace("%r,", "%row.number,")
    text += "  %w = phi i64 [ 0, %row ], [ %w.next, %word ]\n"
    text += f"  %p = phi ptr [ %values, %row ], [ %p{UNROLLED - 1}, %word ]\n"
    for u in range(UNROLLED):
        text += _expanded(u, "%p" if u == 0 else f"%p{u - 1}")
        text += f"""
  %o{u}.at = getelementptr i16, ptr %dense, i64 %c{u}
  store <32 x i16> %v{u}, ptr %o{u}.at, align 2"""
    text += f"""
  %w.next = add i64 %w, {UNROLLED}
  %w.more = icmp slt i64 %w.next, %words
  br i1 %w.more, label %word, label %row.end"""
    head = """
  %row.number = add i64 %r, %row0
  %row.width = shl i64 %words, 5
  %dense.first = mul i64 %r, %row.width
  %dense = getelementptr i16, ptr %w_p, i64 %dense.first
"""
    return _frame("words masks_p values_p starts_p row0 w_p", head + text, _EXPAND + _COUNT)


def _row_text(tokens: int, half: bool) -> str:
    """Values beside their columns: inputs are gathered."""
    lanes = 16  # LLVM halves them for AVX2
    places, inside = f"<{lanes} x ptr>", f"<{lanes} x i1>"
    gather = f"@llvm.masked.gather.v{lanes}f32.v{lanes}p0"
    item = "i16" if half else "float"
    every = ", ".join(["i1 true"] * lanes)
    lane = ", ".join(f"i32 {number}" for number in range(lanes))
    text = "".join(_input(t) for t in range(tokens)) + _OF_ROW
    text += """
  %stop.at = getelementptr i32, ptr %start.at, i64 1
  %stop32 = load i32, ptr %stop.at
  %stop = sext i32 %stop32 to i64
  %any = icmp slt i64 %start, %stop
  br i1 %any, label %entry.loop, label %sums
entry.loop:
  %e = phi i64 [ %start, %row ], [ %e.next, %entry.loop ]
"""
    for t in range(tokens):
        text += f"  %a{t} = phi <{lanes} x float> [ zeroinitializer, %row ], [ %a{t}.new, %entry.loop ]\n"
    text += f"""
  %c.at = getelementptr i16, ptr %columns_p, i64 %e
  %c16 = load <{lanes} x i16>, ptr %c.at, align 2
  %c = zext <{lanes} x i16> %c16 to <{lanes} x i64>
  %v.at = getelementptr {item}, ptr %values_p, i64 %e
  %v.raw = load <{lanes} x {item}>, ptr %v.at, align 2
  %left = sub i64 %stop, %e
  %left32 = trunc i64 %left to i32
  %left.one = insertelement <{lanes} x i32> poison, i32 %left32, i32 0
  %left.all = shufflevector <{lanes} x i32> %left.one, <{lanes} x i32> poison, <{lanes} x i32> zeroinitializer
  %in = icmp slt <{lanes} x i32> <{lane}>, %left.all
"""
    if half:
        text += f"""
  %v.wide = zext <{lanes} x i16> %v.raw to <{lanes} x i32>
  %v.bits = shl <{lanes} x i32> %v.wide, {_all(lanes, 16)}
  %v.all = bitcast <{lanes} x i32> %v.bits to <{lanes} x float>
"""
    else:
        text += f"  %v.all = select <{lanes} x i1> <{every}>, <{lanes} x float> %v.raw, <{lanes} x float> %v.raw\n"
    text += f"  %v = select <{lanes} x i1> %in, <{lanes} x float> %v.all, <{lanes} x float> zeroinitializer\n"
    for t in range(tokens):
        text += f"""
  %g{t}.at = getelementptr float, ptr %x{t}, <{lanes} x i64> %c
  %g{t} = call <{lanes} x float> {gather}({places} %g{t}.at, i32 4, {inside} %in, <{lanes} x float> zeroinitializer)
  %a{t}.new = call {_fma(lanes, f"%g{t}", "%v", f"%a{t}")}"""
    text += f"""
  %e.next = add i64 %e, {lanes}
  %e.more = icmp slt i64 %e.next, %stop
  br i1 %e.more, label %entry.loop, label %sums
sums:
"""
    for t in range(tokens):
        text += f"  %t{t} = phi <{lanes} x float> [ zeroinitializer, %row ], [ %a{t}.new, %entry.loop ]\n"
    for t in range(tokens):
        text += _stored(t, f"%t{t}", lanes)
    text += "  br label %row.end"
    declared = f"declare <{lanes} x float> {gather}({places}, i32, {inside}, <{lanes} x float>)\n"
    return _frame(
        "columns_p values_p starts_p x_p x_stride y_p", text,
        declared + _arithmetic(lanes),
    )  # fmt: skip


def _token_text(vectors: int, half: bool) -> str:
    """Values beside their columns, the input [inputs, tokens]: a value times `vectors` vectors of 16 tokens."""
    item = "i16" if half else "float"
    text = f"""{_OF_ROW}
  %stop.at = getelementptr i32, ptr %start.at, i64 1
  %stop32 = load i32, ptr %stop.at
  %stop = sext i32 %stop32 to i64
  %any = icmp slt i64 %start, %stop
  br i1 %any, label %entry.loop, label %sums
entry.loop:
  %e = phi i64 [ %start, %row ], [ %e.next, %entry.loop ]
"""
    for t in range(vectors):
        text += f"  %a{t} = phi <16 x float> [ zeroinitializer, %row ], [ %a{t}.new, %entry.loop ]\n"
    text += f"""
  %c.at = getelementptr i16, ptr %columns_p, i64 %e
  %c16 = load i16, ptr %c.at
  %c = zext i16 %c16 to i64
  %v.at = getelementptr {item}, ptr %values_p, i64 %e
  %v.raw = load {item}, ptr %v.at
"""
    if half:
        text += """
  %v.wide = zext i16 %v.raw to i32
  %v.bits = shl i32 %v.wide, 16
  %v.one = bitcast i32 %v.bits to float
  %v.first = insertelement <16 x float> poison, float %v.one, i32 0
"""
    else:
        text += "  %v.first = insertelement <16 x float> poison, float %v.raw, i32 0\n"
    text += f"""
  %v = shufflevector <16 x float> %v.first, <16 x float> poison, <16 x i32> zeroinitializer
  %x.first = mul i64 %c, {16 * vectors}
  %x = getelementptr float, ptr %x_p, i64 %x.first"""
    for t in range(vectors):
        text += f"""
  %x{t}.at = getelementptr float, ptr %x, i64 {16 * t}
  %x{t} = load <16 x float>, ptr %x{t}.at, align 4
  %a{t}.new = call {_fma(16, f"%x{t}", "%v", f"%a{t}")}"""
    text += """
  %e.next = add i64 %e, 1
  %e.more = icmp slt i64 %e.next, %stop
  br i1 %e.more, label %entry.loop, label %sums
sums:
"""
    for t in range(vectors):
        text += f"  %t{t} = phi <16 x float> [ zeroinitializer, %row ], [ %a{t}.new, %entry.loop ]\n"
    text += f"""
  %y.first = mul i64 %r, {16 * vectors}
  %y = getelementptr float, ptr %y_p, i64 %y.first"""
    for t in range(vectors):
        text += f"""
  %y{t}.at = getelementptr float, ptr %y, i64 {16 * t}
  store <16 x float> %t{t}, ptr %y{t}.at, align 4"""
    return _frame("columns_p values_p starts_p x_p y_p", text + "\n  br label %row.end", _arithmetic(16))


def _spread_text(half: bool) -> str:
    """Rows `row0` and on: dense rows of `width` columns from values beside their columns."""
    item, size = ("i16", 1) if half else ("i32", 2)
    start = _OF_ROW.replace("%r\n", "%row.number\n")
    text = f"""
  %row.number = add i64 %r, %row0
  %dense.first = mul i64 %r, %width
  %dense = getelementptr {item}, ptr %w_p, i64 %dense.first
  %dense.bytes = shl i64 %width, {size}
  call void @llvm.memset.p0.i64(ptr %dense, i8 0, i64 %dense.bytes, i1 false)
{start}
  %stop.at = getelementptr i32, ptr %start.at, i64 1
  %stop32 = load i32, ptr %stop.at
  %stop = sext i32 %stop32 to i64
  %any = icmp slt i64 %start, %stop
  br i1 %any, label %entry.loop, label %row.end
entry.loop:
  %e = phi i64 [ %start, %row ], [ %e.next, %entry.loop ]
  %c.at = getelementptr i16, ptr %columns_p, i64 %e
  %c16 = load i16, ptr %c.at
  %c = zext i16 %c16 to i64
  %v.at = getelementptr {item}, ptr %values_p, i64 %e
  %v = load {item}, ptr %v.at
  %o.at = getelementptr {item}, ptr %dense, i64 %c
  store {item} %v, ptr %o.at
  %e.next = add i64 %e, 1
  %e.more = icmp slt i64 %e.next, %stop
  br i1 %e.more, label %entry.loop, label %row.end"""
    return _frame(
        "columns_p values_p starts_p row0 width w_p",
        text,
        "declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)\n",
    )


TEXTS: dict[str, Callable[[int], str]] = {
    "masks": _mask_text,
    "rows16": lambda tokens: _row_text(tokens, half=True),
    "rows32": lambda tokens: _row_text(tokens, half=False),
    "expand": _expand_text,
    "tokens16": lambda vectors: _token_text(vectors, half=True),
    "tokens32": lambda vectors: _token_text(vectors, half=False),
    "spread16": lambda tokens: _spread_text(half=True),
    "spread32": lambda tokens: _spread_text(half=False),
}
