// The rotation of `hadamard` on a GPU, bit for bit; see `spec`. A block of threads transforms a tile.
//
// A thread holds a column of 32 rows in registers: first consecutive rows, then, through shared memory, rows
// 32 apart. There, groups of 32 rows are padded by half the banks, which avoids bank conflicts.

const int COLUMNS = ROTATION_COLUMNS;
const int REGISTER_ROWS = 32;
const int GROUP_STRIDE = REGISTER_ROWS * COLUMNS + COLUMNS;
const u32 SIGN = 0x80000000u;

extern __shared__ float shared_memory[];

// Butterflies between the first `rows` values: neighbours first, the two halves last.
__device__ inline void transform(float (&v)[REGISTER_ROWS], int rows)
{
    #pragma unroll
    for (int h = 1; h < REGISTER_ROWS; h *= 2) {
        if (h >= rows)
            break;
        #pragma unroll
        for (int k = 0; k < REGISTER_ROWS; ++k)
            if (!(k & h)) {
                float a = v[k], b = v[k + h];
                v[k] = a + b;
                v[k + h] = a - b;
            }
    }
}

__device__ inline float flip_sign(float x, u32 index, u32 key0, u32 key1)
{
    return float_of(bits_of(x) ^ (hash32(index, key0, key1) & SIGN));
}

// The number of rows of this block's tile, and its first element; 1 row for the rest that no tile covers.
__device__ inline int find_tile(i64 numel, i64 &begin)
{
    i64 size = ROTATION_ROWS * COLUMNS, whole = numel / size;
    begin = (blockIdx.x < whole ? blockIdx.x : whole) * size;
    int rows = ROTATION_ROWS;
    for (i64 after = blockIdx.x - whole; after >= 0; --after) {
        while (rows > 1 && rows * COLUMNS > numel - begin)
            rows /= 2;
        if (after > 0)
            begin += rows * COLUMNS;
    }
    return rows;
}

template <class X, class Y, bool inverse>
__device__ void rotate(const X *x, i64 numel, u32 key0, u32 key1, u32 counter, Y *out)
{
    i64 begin;
    int rows = find_tile(numel, begin);
    x += begin;
    out += begin;
    counter += (u32)begin;
    if (rows == 1) {
        for (int j = threadIdx.x; j < numel - begin; j += blockDim.x)
            out[j] = from_float<Y>(flip_sign(to_float(x[j]), counter + j, key0, key1));
        return;
    }
    int column = threadIdx.x % COLUMNS, group = threadIdx.x / COLUMNS;
    int inner_rows = rows < REGISTER_ROWS ? rows : REGISTER_ROWS, outer_rows = rows / REGISTER_ROWS;
    float scale = (float)(1 / sqrt((double)rows)), v[REGISTER_ROWS];

    if (group * REGISTER_ROWS < rows) {
        int first = group * REGISTER_ROWS * COLUMNS + column;
        #pragma unroll
        for (int k = 0; k < REGISTER_ROWS; ++k)
            v[k] = k < inner_rows ? to_float(x[first + k * COLUMNS]) * scale : 0.0f;
        if (!inverse)
            #pragma unroll
            for (int k = 0; k < REGISTER_ROWS; ++k)
                v[k] = flip_sign(v[k], counter + first + k * COLUMNS, key0, key1);
        transform(v, inner_rows);
        #pragma unroll
        for (int k = 0; k < REGISTER_ROWS; ++k)
            shared_memory[group * GROUP_STRIDE + k * COLUMNS + column] = v[k];
    }
    __syncthreads();
    if (group < inner_rows) {
        int first = group * COLUMNS + column;
        #pragma unroll
        for (int k = 0; k < REGISTER_ROWS; ++k)
            v[k] = k == 0 || k < outer_rows ? shared_memory[k * GROUP_STRIDE + first] : 0.0f;
        transform(v, outer_rows);
        #pragma unroll
        for (int k = 0; k < REGISTER_ROWS; ++k) {
            int j = k * REGISTER_ROWS * COLUMNS + first;
            if (k == 0 || k < outer_rows)
                out[j] = from_float<Y>(inverse ? flip_sign(v[k], counter + j, key0, key1) : v[k]);
        }
    }
}

#define KERNELS(name, X)                                                                                          \
    extern "C" __global__ void __launch_bounds__(REGISTER_ROWS *COLUMNS, 2)                                       \
        rotate_##name(const X *x, i64 numel, u32 key0, u32 key1, u32 counter, float *out)                         \
    {                                                                                                             \
        rotate<X, float, false>(x, numel, key0, key1, counter, out);                                              \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(REGISTER_ROWS *COLUMNS, 2)                                       \
        unrotate_##name(const float *x, i64 numel, u32 key0, u32 key1, u32 counter, X *out)                       \
    {                                                                                                             \
        rotate<float, X, true>(x, numel, key0, key1, counter, out);                                               \
    }

KERNELS(float32, float)
KERNELS(float16, Half)
KERNELS(bfloat16, BFloat16)
