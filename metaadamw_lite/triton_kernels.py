"""The kernels of a step on a GPU; ``triton_step`` launches them. Importing this module needs Triton.

A table of int64 words on the device describes the tensors. Row r holds word r of all n tensors; a record of ``RECORD``
words for each parameter group follows, and the value of the time feature. A word is an address, an integer, or the bits
of a float64; ``numbers`` is a float64 pointer to the same memory.
"""

import triton
import triton.language as tl

# Rows of the table.
THETA = tl.constexpr(0)
G = tl.constexpr(1)
M = tl.constexpr(2)
V = tl.constexpr(3)
STEP = tl.constexpr(4)  # address of the step count, a float32
NUMEL = tl.constexpr(5)  # elements of this process's part
TOTAL = tl.constexpr(6)  # elements of the whole tensor, at least 1
GROUP = tl.constexpr(7)  # modulation group
CODE = tl.constexpr(8)  # type codes of θ, g, m and v, two bits each
FIRST = tl.constexpr(9)  # index of the tensor's first chunk
SETTINGS = tl.constexpr(10)  # index of its record
ROWS = tl.constexpr(11)

# Words of a record.
LR = tl.constexpr(0)
LR_ADDRESS = tl.constexpr(1)  # of a learning rate on the device, or 0
LR_CODE = tl.constexpr(2)
BETA1 = tl.constexpr(3)
LOG_BETA1 = tl.constexpr(4)
BETA2 = tl.constexpr(5)
LOG_BETA2 = tl.constexpr(6)
EPS = tl.constexpr(7)
WEIGHT_DECAY = tl.constexpr(8)
RECORD = tl.constexpr(9)

# Type codes, as in ``triton_step.CODES``.
FLOAT32 = tl.constexpr(0)
FLOAT64 = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)
FLOAT16 = tl.constexpr(3)
MIXED = tl.constexpr(-1)  # tensors have different codes; row CODE has them

# Kinds of feature columns. A column's code is kind · 8 + index of the statistic or constant.
MEAN = tl.constexpr(0)
STD = tl.constexpr(1)
VARIANCE = tl.constexpr(2)
CONSTANT = tl.constexpr(3)
TIME = tl.constexpr(4)
COSINE = tl.constexpr(3)  # index of this statistic in ``features.tensor_statistics``


@triton.jit
def read(address, code, offsets, mask, WIDE: tl.constexpr):
    """Load elements of any supported type from an address and widen them; masked ones are zero."""
    if code == FLOAT32:
        x = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0).to(WIDE)
    elif code == FLOAT64:
        x = tl.load(address.to(tl.pointer_type(tl.float64)) + offsets, mask=mask, other=0.0).to(WIDE)
    elif code == BFLOAT16:
        x = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=0.0).to(WIDE)
    else:
        x = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=0.0).to(WIDE)
    return x


@triton.jit
def write(address, code, offsets, x, mask):
    """Round elements to their tensor's type and store them at an address."""
    if code == FLOAT32:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offsets, x.to(tl.float32), mask=mask)
    elif code == FLOAT64:
        tl.store(address.to(tl.pointer_type(tl.float64)) + offsets, x.to(tl.float64), mask=mask)
    elif code == BFLOAT16:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + offsets, x.to(tl.float32).to(tl.bfloat16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offsets, x.to(tl.float32).to(tl.float16), mask=mask)


@triton.jit
def chunk_of(table, chunks, n, CHUNK: tl.constexpr):
    """Return tensor index, first element and number of elements of this program's chunk."""
    c = tl.program_id(0)
    i = tl.load(chunks + c).to(tl.int64)
    start = (c - tl.load(table + FIRST * n + i)) * CHUNK
    length = tl.minimum(tl.load(table + NUMEL * n + i) - start, CHUNK)
    return i, start, length.to(tl.int32)


@triton.jit(do_not_specialize=["n", "n_chunks"])
def sum_chunks(
    table,
    chunks,
    partial,
    n,
    n_chunks,
    SAME: tl.constexpr,
    ZEROS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the sums over each chunk, in float64: partial, (5 or 7, chunks).

    Rows are ⟨g, g⟩, ⟨g, m⟩, ⟨m, m⟩, ⟨θ, θ⟩, ⟨v, v⟩ and, if ZEROS, the number of zeros in g and in m. In float64
    squares of float32 numbers are exact and cannot overflow.
    """
    i, start, length = chunk_of(table, chunks, n, CHUNK)
    if SAME == MIXED:
        code = tl.load(table + CODE * n + i)
    else:
        code: tl.constexpr = SAME
    at_theta = tl.load(table + THETA * n + i)
    at_g = tl.load(table + G * n + i)
    at_m = tl.load(table + M * n + i)
    at_v = tl.load(table + V * n + i)
    gg = tl.zeros([BLOCK], tl.float64)
    gm = tl.zeros([BLOCK], tl.float64)
    mm = tl.zeros([BLOCK], tl.float64)
    tt = tl.zeros([BLOCK], tl.float64)
    vv = tl.zeros([BLOCK], tl.float64)
    zeros_g = tl.zeros([BLOCK], tl.int32)
    zeros_m = tl.zeros([BLOCK], tl.int32)
    for low in range(0, length, BLOCK):
        position = low + tl.arange(0, BLOCK)
        mask = position < length
        offsets = start + position
        g = read(at_g, (code >> 2) & 3, offsets, mask, tl.float64)
        m = read(at_m, (code >> 4) & 3, offsets, mask, tl.float64)
        theta = read(at_theta, code & 3, offsets, mask, tl.float64)
        v = read(at_v, (code >> 6) & 3, offsets, mask, tl.float64)
        gg += g * g
        gm += g * m
        mm += m * m
        tt += theta * theta
        vv += v * v
        if ZEROS:
            zeros_g += (mask & (g == 0)).to(tl.int32)
            zeros_m += (mask & (m == 0)).to(tl.int32)
    out = partial + tl.program_id(0)
    tl.store(out, tl.sum(gg))
    tl.store(out + n_chunks, tl.sum(gm))
    tl.store(out + 2 * n_chunks, tl.sum(mm))
    tl.store(out + 3 * n_chunks, tl.sum(tt))
    tl.store(out + 4 * n_chunks, tl.sum(vv))
    if ZEROS:
        tl.store(out + 5 * n_chunks, tl.sum(zeros_g).to(tl.float64))
        tl.store(out + 6 * n_chunks, tl.sum(zeros_m).to(tl.float64))


@triton.jit(do_not_specialize=["n", "n_chunks"])
def sum_tensors(table, partial, sums, n, n_chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the chunks of each tensor in fixed order: sums, (n, 5 or 7), one program for each element."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    first = tl.load(table + FIRST * n + i)
    count = (tl.load(table + NUMEL * n + i) + CHUNK - 1) // CHUNK
    total = tl.zeros([BLOCK], tl.float64)
    for low in range(0, count.to(tl.int32), BLOCK):
        position = low + tl.arange(0, BLOCK)
        total += tl.load(partial + j * n_chunks + first + position, mask=position < count, other=0.0)
    tl.store(sums + i * tl.num_programs(1) + j, tl.sum(total))


@triton.jit
def statistic(sums, table, i, here, s, n, COLUMNS: tl.constexpr):
    """Compute statistic s of tensors i (``features.tensor_statistics``); 5 and 6 are the shares of zeros in g and m."""
    if s == COSINE:
        gg = tl.load(sums + i * COLUMNS, mask=here, other=0.0)
        gm = tl.load(sums + i * COLUMNS + 1, mask=here, other=0.0)
        mm = tl.load(sums + i * COLUMNS + 2, mask=here, other=0.0)
        norms = tl.sqrt(gg) * tl.sqrt(mm)
        x = gm / tl.where(norms < 2.2250738585072014e-308, 2.2250738585072014e-308, norms)
        x = tl.where(x > 1, 1.0, tl.where(x < -1, -1.0, x))  # NaN stays
    elif s > 4:
        x = tl.load(sums + i * COLUMNS + s, mask=here, other=0.0)
        x = x / tl.load(table + TOTAL * n + i, mask=here, other=1).to(tl.float64)
    else:
        # The squares of ‖g‖, ‖m‖, ‖θ‖, ‖v‖ are columns 0, 2, 3, 4 of the inner products.
        column = tl.where(s == 4, 4, tl.where(s == 0, 0, s + 1))
        x = tl.sqrt(tl.load(sums + i * COLUMNS + column, mask=here, other=0.0))
    return x


@triton.jit(do_not_specialize=["n", "groups", "at_time"])
def feature_columns(
    sums,
    table,
    numbers,
    columns,
    constants,
    features,
    n,
    groups,
    at_time,
    COLUMNS: tl.constexpr,
    STANDARDISED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the feature matrix (section 3.3), (groups, D), as in ``features.group_features``, one program a column.

    ``columns`` holds the code of each column; ``constants``, (groups, 3), ``features.structural_features``.
    """
    c = tl.program_id(0)
    kind = tl.load(columns + c) // 8
    s = tl.load(columns + c) % 8
    k = tl.arange(0, GROUPS)
    exists = k < groups
    if kind == CONSTANT:
        values = tl.load(constants + k * 3 + s, mask=exists, other=0.0)
    elif kind == TIME:
        values = tl.load(numbers + at_time) + tl.zeros([GROUPS], tl.float64)
    else:
        total = tl.zeros([GROUPS], tl.float64)
        count = tl.zeros([GROUPS], tl.int32)
        for low in range(0, n, BLOCK):
            i = low + tl.arange(0, BLOCK)
            x = statistic(sums, table, i, i < n, s, n, COLUMNS)
            member = tl.load(table + GROUP * n + i, mask=i < n, other=-1)
            match = member[None, :] == k[:, None]
            total += tl.sum(tl.where(match, x[None, :], 0.0), axis=1)
            count += tl.sum(match.to(tl.int32), axis=1)
        used = count > 0
        size = tl.maximum(count, 1).to(tl.float64)
        values = total / size
        if kind != MEAN:
            squares = tl.zeros([GROUPS], tl.float64)
            for low in range(0, n, BLOCK):
                i = low + tl.arange(0, BLOCK)
                x = statistic(sums, table, i, i < n, s, n, COLUMNS)
                member = tl.load(table + GROUP * n + i, mask=i < n, other=-1)
                deviation = tl.where(member[None, :] == k[:, None], x[None, :] - values[:, None], 0.0)
                squares += tl.sum(deviation * deviation, axis=1)
            values = squares / size
            if kind == STD:
                values = tl.sqrt(values)
        if STANDARDISED:
            number = tl.maximum(tl.sum(used.to(tl.int32)), 1).to(tl.float64)
            centre = tl.sum(tl.where(used, values, 0.0)) / number
            centred = tl.where(used, values - centre, 0.0)
            std = tl.sqrt(tl.sum(centred * centred) / number)
            largest = tl.max(tl.where(used, tl.abs(values), 0.0))
            same = std <= 1e-6 * largest  # varies only by rounding
            values = tl.where(same, 0.0, centred / tl.where(same, 1.0, std))
    tl.store(
        features + k * tl.num_programs(0) + c,
        values.to(features.dtype.element_ty),
        mask=exists,
    )


@triton.jit
def sigmoid(x):
    """Compute σ(x)."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def matrix(start, rows, columns, ROW: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Load the transpose of a (HEIGHT, WIDTH) weight matrix with row stride ROW, padded with zeros."""
    mask = (columns < WIDTH)[:, None] & (rows < HEIGHT)[None, :]
    return tl.load(start + rows[None, :] * ROW + columns[:, None], mask=mask, other=0.0)


@triton.jit
def vector(start, at, LENGTH: tl.constexpr):
    """Load a vector as a row, padded with zeros."""
    return tl.load(start + at, mask=at < LENGTH, other=0.0)[None, :]


@triton.jit
def layer_norm(z, gain, shift, column, eps, WIDTH: tl.constexpr):
    """Apply a layer norm to the rows of z; columns beyond WIDTH stay zero."""
    inside = (column < WIDTH)[None, :]
    centred = tl.where(inside, z - (tl.sum(z, axis=1) / WIDTH)[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / WIDTH
    return centred / tl.sqrt(variance + eps)[:, None] * gain + shift


@triton.jit(do_not_specialize=["groups", "layers"])
def modulate(
    features,
    weights,
    constants,
    alpha,
    beta,
    groups,
    layers,
    LARGEST: tl.constexpr,
    D: tl.constexpr,
    EMBEDDING: tl.constexpr,
    GATED: tl.constexpr,
    HEADS: tl.constexpr,
    HIDDEN: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTHS: tl.constexpr,
    UNITS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Compute α and β, (groups,), from features, (groups, D): Φ without gradients (Eq. 5 to 8) in one program.

    ``weights`` holds the parameters of ``Modulator`` in order; ``constants`` range_α, range_β and the ε of the two
    layer norms. GROUPS and WIDTHS are powers of two, at least the numbers of groups and columns; padding is zero. The
    loops process TOGETHER heads (stacked as rows) and UNITS hidden units at a time.
    """
    W: tl.constexpr = D + EMBEDDING
    SIZE: tl.constexpr = W // HEADS
    wide: tl.constexpr = weights.dtype.element_ty
    row = tl.arange(0, GROUPS)
    column = tl.arange(0, WIDTHS)
    unit = tl.arange(0, UNITS)
    exists = row < groups
    range_alpha = tl.load(constants).to(wide)
    range_beta = tl.load(constants + 1).to(wide)
    eps1 = tl.load(constants + 2).to(wide)
    eps2 = tl.load(constants + 3).to(wide)

    inside = exists[:, None] & (column < D)[None, :]
    z = tl.load(features + row[:, None] * D + column[None, :], mask=inside, other=0.0).to(wide)
    z = tl.where(z == z, z, 0.0)  # NaN counts as zero
    z = tl.where(z > LARGEST, LARGEST, tl.where(z < -LARGEST, -LARGEST, z))
    if EMBEDDING > 0:
        inside = exists[:, None] & (column >= D)[None, :] & (column < W)[None, :]
        z += tl.load(weights + row[:, None] * EMBEDDING + (column - D)[None, :], mask=inside, other=0.0)
        weights += groups * EMBEDDING
    if GATED:
        z *= sigmoid(vector(weights, column, W))
        weights += W
    z = z.to(wide)

    head = tl.arange(0, TOGETHER)
    scale = 1 / tl.sqrt(tl.full([1, 1], SIZE, wide))
    for _ in range(layers):
        w_q = matrix(weights, column, column, W, W, W)
        w_k = matrix(weights + W * W, column, column, W, W, W)
        w_v = matrix(weights + 2 * W * W, column, column, W, W, W)
        weights += 3 * W * W
        b_q = vector(weights, column, W)
        b_k = vector(weights + W, column, W)
        b_v = vector(weights + 2 * W, column, W)
        weights += 3 * W
        w_o = matrix(weights, column, column, W, W, W)
        b_o = vector(weights + W * W, column, W)
        weights += W * W + W
        up = weights
        down = up + HIDDEN * W + HIDDEN
        b_down = vector(down + W * HIDDEN, column, W)
        weights = down + W * HIDDEN + W
        gain1 = vector(weights, column, W)
        shift1 = vector(weights + W, column, W)
        gain2 = vector(weights + 2 * W, column, W)
        shift2 = vector(weights + 3 * W, column, W)
        weights += 4 * W

        normed = layer_norm(z, gain1, shift1, column, eps1, W)
        q = (tl.dot(normed, w_q, input_precision="ieee", out_dtype=wide) + b_q) * scale
        k = tl.trans(tl.dot(normed, w_k, input_precision="ieee", out_dtype=wide) + b_k)
        v = tl.dot(normed, w_v, input_precision="ieee", out_dtype=wide) + b_v
        attended = tl.zeros([GROUPS, WIDTHS], wide)
        for first in range(0, HEADS, TOGETHER):
            mine = (column // SIZE)[None, None, :] == (first + head)[:, None, None]
            queries = tl.reshape(tl.where(mine, q[None, :, :], 0.0), [TOGETHER * GROUPS, WIDTHS])
            scores = tl.dot(queries, k, input_precision="ieee", out_dtype=wide)
            scores = tl.where(exists[None, :], scores, float("-inf"))
            shares = tl.exp(scores - tl.max(scores, axis=1)[:, None])
            shares = shares / tl.sum(shares, axis=1)[:, None]
            values = tl.dot(shares, v, input_precision="ieee", out_dtype=wide)
            values = tl.reshape(values, [TOGETHER, GROUPS, WIDTHS])
            attended += tl.sum(tl.where(mine, values, 0.0), axis=0)
        z += tl.dot(attended, w_o, input_precision="ieee", out_dtype=wide) + b_o
        normed = layer_norm(z, gain2, shift2, column, eps2, W)
        z += b_down
        for first in range(0, HIDDEN, UNITS):
            w_up = matrix(up, first + unit, column, W, HIDDEN, W)
            b_up = vector(up + HIDDEN * W, first + unit, HIDDEN)
            w_down = matrix(down, column, first + unit, HIDDEN, W, HIDDEN)
            hidden = tl.dot(normed, w_up, input_precision="ieee", out_dtype=wide) + b_up
            hidden = tl.where(hidden < 0, 0.0, hidden)
            z += tl.dot(hidden, w_down, input_precision="ieee", out_dtype=wide)

    # Eq. 6 to 8, without the output rows of λ₁ and λ₂.
    alpha_raw = tl.sum(z * vector(weights, column, W), axis=1) + tl.load(weights + 4 * W)
    beta_raw = tl.sum(z * vector(weights + W, column, W), axis=1) + tl.load(weights + 4 * W + 1)
    tl.store(alpha + row, 1 + range_alpha * (sigmoid(alpha_raw) - 0.5), mask=exists)
    tl.store(beta + row, 1 + range_beta * (sigmoid(beta_raw) - 0.5), mask=exists)


@triton.jit(do_not_specialize=["n"])
def prepare(table, numbers, alpha, beta, rates, n, BLOCK: tl.constexpr):
    """Count the step of each tensor and compute its rates, (3, n), in float64: ηαβλ, ηα/(1 − β₁ᵗ) and √(1 − β₂ᵗ)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    k = tl.load(table + GROUP * n + i, mask=here, other=0)
    record = ROWS * n + tl.load(table + SETTINGS * n + i, mask=here, other=0) * RECORD
    lr = tl.load(numbers + record + LR, mask=here, other=0.0)
    address = tl.load(table + record + LR_ADDRESS, mask=here, other=0)
    code = tl.load(table + record + LR_CODE, mask=here, other=0)
    short = (address != 0) & (code == FLOAT32)
    long = (address != 0) & (code == FLOAT64)
    lr = tl.where(short, read(address, FLOAT32, 0, short, tl.float64), lr)
    lr = tl.where(long, read(address, FLOAT64, 0, long, tl.float64), lr)
    step = tl.load(table + STEP * n + i, mask=here, other=0).to(tl.pointer_type(tl.float32))
    t = tl.load(step, mask=here, other=0.0) + 1
    tl.store(step, t, mask=here)
    t = t.to(tl.float64)
    rate = lr * tl.load(alpha + k, mask=here, other=0.0).to(tl.float64)
    decay = tl.load(beta + k, mask=here, other=0.0).to(tl.float64)
    decay = rate * (decay * tl.load(numbers + record + WEIGHT_DECAY, mask=here, other=0.0))
    bias1 = 1 - tl.exp(t * tl.load(numbers + record + LOG_BETA1, mask=here, other=-1.0))
    bias2 = 1 - tl.exp(t * tl.load(numbers + record + LOG_BETA2, mask=here, other=-1.0))
    tl.store(rates + i, decay, mask=here)
    tl.store(rates + n + i, rate / bias1, mask=here)
    tl.store(rates + 2 * n + i, tl.sqrt(bias2), mask=here)


@triton.jit(do_not_specialize=["n"])
def update(
    table,
    numbers,
    chunks,
    rates,
    n,
    SAME: tl.constexpr,
    DOUBLE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Apply Eq. 1 to 4 to every chunk, in the order of operations of torch's fused AdamW.

    Computes in float32, or in float64 if DOUBLE (any tensor is float64).
    """
    i, start, length = chunk_of(table, chunks, n, CHUNK)
    if SAME == MIXED:
        code = tl.load(table + CODE * n + i)
    else:
        code: tl.constexpr = SAME
    if DOUBLE:
        wide: tl.constexpr = tl.float64
    else:
        wide: tl.constexpr = tl.float32
    at_theta = tl.load(table + THETA * n + i)
    at_g = tl.load(table + G * n + i)
    at_m = tl.load(table + M * n + i)
    at_v = tl.load(table + V * n + i)
    record = numbers + ROWS * n + tl.load(table + SETTINGS * n + i) * RECORD
    beta1 = tl.load(record + BETA1)
    beta2 = tl.load(record + BETA2)
    rest1 = (1 - beta1).to(wide)
    rest2 = (1 - beta2).to(wide)
    beta1 = beta1.to(wide)
    beta2 = beta2.to(wide)
    eps = tl.load(record + EPS).to(wide)
    decay = tl.load(rates + i).to(wide)
    rate = tl.load(rates + n + i).to(wide)
    root = tl.load(rates + 2 * n + i).to(wide)
    for low in range(0, length, BLOCK):
        position = low + tl.arange(0, BLOCK)
        mask = position < length
        offsets = start + position
        theta = read(at_theta, code & 3, offsets, mask, wide)
        g = read(at_g, (code >> 2) & 3, offsets, mask, wide)
        m = read(at_m, (code >> 4) & 3, offsets, mask, wide)
        v = read(at_v, (code >> 6) & 3, offsets, mask, wide)
        theta = tl.where(decay == 0, theta, theta - decay * theta)
        m = beta1 * m + rest1 * g  # Eq. 1
        v = beta2 * v + (rest2 * g) * g  # Eq. 2
        if DOUBLE:
            theta -= rate * m / (tl.sqrt(v) / root + eps)  # Eq. 3 and 4
        else:  # in float32 the operators / and tl.sqrt are approximate
            theta -= tl.div_rn(rate * m, tl.div_rn(tl.sqrt_rn(v), root + tl.zeros_like(v)) + eps)
        write(at_theta, code & 3, offsets, theta, mask)
        write(at_m, (code >> 4) & 3, offsets, m, mask)
        write(at_v, (code >> 6) & 3, offsets, v, mask)
