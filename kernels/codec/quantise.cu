// The kernels of `quantise` on a GPU, with the same arguments and identical bits; see `spec`.
//
// A thread processes four consecutive words of a tile, or four elements in each of several rows, so that a
// warp reads and writes consecutive memory; it loads BATCH rows before it processes the first of them.

const int BATCH = 2;
const int MASK_ROWS = 32;
const int WARP = 32;
const u32 FULL_WARP = 0xffffffffu;
const u32 INFINITY_BITS = 0x7f800000u;

__device__ inline i64 end_of_row(i64 r, i64 row, i64 numel)
{
    return (r + 1) * row < numel ? (r + 1) * row : numel;
}

template <bool aligned, class X>
__device__ inline void load_rows(
    const X *x, const float *residual, i64 numel, i64 row, i64 r, int rows, i64 j, Four<float> (&v)[BATCH])
{
    #pragma unroll
    for (int b = 0; b < BATCH; ++b)
        load_sum<aligned>(x, residual, (r + b) * row + j, b < rows ? end_of_row(r + b, row, numel) : 0, v[b]);
}

__device__ inline u32 round_up(u32 bits)
{
    if (bits >= INFINITY_BITS)
        return NOT_FINITE;
    u32 up = (bits + 0xffff) >> 16;
    return up < LARGEST_NORM ? up : LARGEST_NORM;
}

// The sum over a warp of four partial sums of each thread.
__device__ inline double total(double (&s)[4])
{
    for (int h = WARP / 2; h > 0; h /= 2)
        #pragma unroll
        for (int m = 0; m < 4; ++m)
            s[m] += __shfl_xor_sync(FULL_WARP, s[m], h);
    return (s[0] + s[2]) + (s[1] + s[3]);
}

template <bool aligned, class X>
__device__ void row_norms(
    const X *x, const float *residual, i64 numel, i64 row, i64 rows, bool euclidean, unsigned short *norms)
{
    int thread = threadIdx.x % WARP;
    for (i64 r = thread_index() / WARP; r < rows; r += thread_count() / WARP) {
        i64 stop = end_of_row(r, row, numel);
        u32 largest = 0;
        double squares[4] = {};
        #pragma unroll 4
        for (i64 at = r * row + 4 * thread; at < stop; at += 4 * WARP) {
            Four<float> v;
            load_sum<aligned>(x, residual, at, stop, v);
            #pragma unroll
            for (int m = 0; m < 4; ++m) {
                u32 magnitude = bits_of(v.v[m]) & 0x7fffffffu;
                largest = magnitude > largest ? magnitude : largest;
                if (euclidean)
                    squares[m] += (double)v.v[m] * v.v[m];
            }
        }
        for (int h = WARP / 2; h > 0; h /= 2) {
            u32 other = __shfl_xor_sync(FULL_WARP, largest, h);
            largest = other > largest ? other : largest;
        }
        if (euclidean && largest < INFINITY_BITS) {
            float length = (float)sqrt(total(squares)), most = float_of(LARGEST_NORM << 16);
            u32 bits = bits_of(length < most ? length : most);
            largest = bits > largest ? bits : largest;
        }
        if (thread == 0)
            norms[r] = (unsigned short)round_up(largest);
    }
}

// A thread computes the bits of 32 rows, for one scale.
template <bool aligned, class X>
__device__ void choose_scales(
    const X *x, const float *residual, const unsigned short *norms, i64 numel, i64 row, i64 rows,
    const float *levels, int scales, u32 *masks)
{
    u32 quads = (u32)((row + 3) / 4), groups = (u32)((rows + MASK_ROWS - 1) / MASK_ROWS);
    float top = levels[0];
    for (i64 i = thread_index(); i < (i64)(scales - 1) * groups * quads; i += thread_count()) {
        u32 group = (u32)(i / quads) % groups;
        i64 k = i / quads / groups, j = i % quads * 4;
        Four<u32> mask = {};
        for (int first = 0; first < MASK_ROWS; first += BATCH) {
            i64 r = (i64)group * MASK_ROWS + first;
            Four<float> v[BATCH];
            int here = r + BATCH <= rows ? BATCH : r < rows ? (int)(rows - r) : 0;
            load_rows<aligned>(x, residual, numel, row, r, here, j, v);
            #pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                if (b >= here)
                    break;
                Scale scale = scale_of(norms[r + b]);
                float inverse = inverse_of(levels[k + 1], scale.base);
                i64 stop = end_of_row(r + b, row, numel);
                #pragma unroll
                for (int m = 0; m < 4; ++m) {
                    bool fits = fabsf(v[b].v[m] * scale.pre * inverse) <= top;
                    if (fits && (r + b) * row + j + m < stop)
                        mask.v[m] |= 1u << (first + b);
                }
            }
        }
        store<aligned>(masks + (k * groups + group) * row, j, row, mask);
    }
}

// Levels per unit of four elements of row r.
template <bool multiscale, bool aligned>
__device__ inline void inverses_of(
    const float *levels, int scales, float base, const u32 *masks, i64 mask_words, i64 r, i64 row, i64 j,
    Four<float> &inverses)
{
    float first = inverse_of(levels[0], base);
    inverses = Four<float>{{first, first, first, first}};
    for (int k = 1; multiscale && k < scales; ++k) {
        float inverse = inverse_of(levels[k], base);
        Four<u32> mask;
        load<aligned>(masks + (k - 1) * mask_words + r / MASK_ROWS * row, j, row, mask);
        #pragma unroll
        for (int m = 0; m < 4; ++m)
            if (mask.v[m] >> (r % MASK_ROWS) & 1)
                inverses.v[m] = inverse;
    }
}

template <class X, class W, bool multiscale, bool aligned>
__device__ void encode(
    const X *x, float *residual, const unsigned short *norms, i64 numel, i64 row, i64 tiles, int lanes, int width,
    const float *levels, int scales, const u32 *masks, i64 mask_words, u32 key0, u32 key1, u32 offset, W *words)
{
    u32 quads = (u32)((row + 3) / 4);
    float top = levels[0];
    for (i64 i = thread_index(); i < tiles * quads; i += thread_count()) {
        u32 tile = (u32)i / quads;
        i64 j = (u32)i % quads * 4;
        Four<W> word = {};
        for (int first = 0; first < lanes; first += BATCH) {
            Four<float> v[BATCH];
            i64 r = (i64)tile * lanes + first;
            load_rows<aligned>(x, residual, numel, row, r, lanes - first, j, v);
            #pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                i64 at = (r + b) * row + j, stop = end_of_row(r + b, row, numel);
                if (first + b >= lanes || at >= stop)
                    break;
                Scale scale = scale_of(norms[r + b]);
                Four<float> inverse, remainder;
                inverses_of<multiscale, aligned>(
                    levels, scales, scale.base, masks, mask_words, r + b, row, j, inverse);
                #pragma unroll
                for (int m = 0; m < 4; ++m) {
                    float y = v[b].v[m] * scale.pre * inverse.v[m], low = floorf(y);
                    if (uniform(offset + (u32)(at + m), key0, key1) < y - low)
                        low += 1.0f;
                    float code = low < -top ? -top : low > top ? top : low;
                    float step = inverse.v[m] > 0 ? 1.0f / inverse.v[m] : 0.0f;
                    remainder.v[m] = v[b].v[m] - code * step * scale.post;
                    if (at + m < stop)
                        word.v[m] |= (W)(u32)(int)(code + top) << ((first + b) * width);
                }
                if (residual)
                    store<aligned>(residual, at, stop, remainder);
            }
        }
        store<aligned>(words + tile * row, j, row, word);
    }
}

template <class X, class W, bool multiscale, bool aligned>
__device__ void decode(
    const W *words, const unsigned short *norms, i64 numel, i64 row, i64 tiles, int lanes, int width,
    const float *levels, int scales, const u32 *masks, i64 mask_words, int terms, float factor, X *out)
{
    u32 quads = (u32)((row + 3) / 4);
    W lane_mask = 0xffffffffu >> (32 - width);
    u32 bias = (u32)levels[0] * (u32)terms; // unsigned, because a lane may have all 32 bits
    for (i64 i = thread_index(); i < tiles * quads; i += thread_count()) {
        u32 tile = (u32)i / quads;
        i64 j = (u32)i % quads * 4;
        Four<W> word;
        load<aligned>(words + tile * row, j, row, word);
        #pragma unroll 4
        for (int lane = 0; lane < lanes; ++lane) {
            i64 r = (i64)tile * lanes + lane, at = r * row + j, stop = end_of_row(r, row, numel);
            if (at >= stop)
                break;
            Scale scale = scale_of(norms[r]);
            Four<float> inverse;
            Four<X> value;
            inverses_of<multiscale, aligned>(levels, scales, scale.base, masks, mask_words, r, row, j, inverse);
            #pragma unroll
            for (int m = 0; m < 4; ++m) {
                int code = (int)((u32)(word.v[m] >> (lane * width) & lane_mask) - bias);
                float step = inverse.v[m] > 0 ? factor / inverse.v[m] : 0.0f;
                value.v[m] = from_float<X>((float)code * step * scale.post);
            }
            store<aligned>(out, at, stop, value);
        }
    }
}

#define ROWS(x_name, X)                                                                                           \
    extern "C" __global__ void norms_##x_name(                                                                    \
        const X *x, const float *residual, i64 numel, i64 row, i64 rows, int aligned, int euclidean,              \
        unsigned short *norms)                                                                                    \
    {                                                                                                             \
        aligned ? row_norms<true>(x, residual, numel, row, rows, euclidean, norms)                                \
                : row_norms<false>(x, residual, numel, row, rows, euclidean, norms);                              \
    }                                                                                                             \
    extern "C" __global__ void choose_scales_##x_name(                                                            \
        const X *x, const float *residual, const unsigned short *norms, i64 numel, i64 row, i64 rows, int aligned,\
        const float *levels, int scales, u32 *masks)                                                              \
    {                                                                                                             \
        aligned ? choose_scales<true>(x, residual, norms, numel, row, rows, levels, scales, masks)                \
                : choose_scales<false>(x, residual, norms, numel, row, rows, levels, scales, masks);              \
    }

// Four instances: one scale or several, aligned or not.
#define DISPATCH(function, X, W, ...)                                                                             \
    if (scales > 1)                                                                                               \
        aligned ? function<X, W, true, true>(__VA_ARGS__) : function<X, W, true, false>(__VA_ARGS__);             \
    else                                                                                                          \
        aligned ? function<X, W, false, true>(__VA_ARGS__) : function<X, W, false, false>(__VA_ARGS__);

#define WORDS(x_name, X, word_name, W)                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 3) encode_##x_name##_##word_name(                           \
        const X *x, float *residual, const unsigned short *norms, i64 numel, i64 row, i64 tiles, int aligned,     \
        int lanes, int width, const float *levels, int scales, const u32 *masks, i64 mask_words, u32 key0,        \
        u32 key1, u32 offset, W *words)                                                                           \
    {                                                                                                             \
        DISPATCH(encode, X, W, x, residual, norms, numel, row, tiles, lanes, width, levels, scales, masks,        \
                 mask_words, key0, key1, offset, words)                                                           \
    }                                                                                                             \
    extern "C" __global__ void decode_##x_name##_##word_name(                                                     \
        const W *words, const unsigned short *norms, i64 numel, i64 row, i64 tiles, int aligned, int lanes,       \
        int width, const float *levels, int scales, const u32 *masks, i64 mask_words, int terms, float factor,    \
        X *out)                                                                                                   \
    {                                                                                                             \
        DISPATCH(decode, X, W, words, norms, numel, row, tiles, lanes, width, levels, scales, masks, mask_words,  \
                 terms, factor, out)                                                                              \
    }

#define KERNELS(x_name, X)                                                                                        \
    ROWS(x_name, X)                                                                                               \
    WORDS(x_name, X, int32, u32)                                                                                  \
    WORDS(x_name, X, int64, u64)

KERNELS(float32, float)
KERNELS(float16, Half)
KERNELS(bfloat16, BFloat16)
