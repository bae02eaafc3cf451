// The rotation of `rotate` for a GPU, with the same bits; see `spec`. A block of threads has a tile.
//
// A thread has a column of 32 rows in registers: first of neighbours, then, through shared memory, of rows
// 32 apart. There, groups of 32 rows lie apart by half the banks more, so that no two threads meet in one.

const int COLUMNS = ROTATION_COLUMNS;
const int NEAR = 32;
const int APART = NEAR * COLUMNS + COLUMNS;
const u32 SIGN = 0x80000000u;

extern __shared__ float shared_memory[];

// Butterflies between the first `rows` values: neighbours first, halves last.
__device__ inline void transform(float (&v)[NEAR], int rows)
{
    #pragma unroll
    for (int h = 1; h < NEAR; h *= 2) {
        if (h >= rows)
            break;
        #pragma unroll
        for (int k = 0; k < NEAR; ++k)
            if (!(k & h)) {
                float a = v[k], b = v[k + h];
                v[k] = a + b;
                v[k + h] = a - b;
            }
    }
}

__device__ inline float flipped(float x, u32 index, u32 key0, u32 key1)
{
    return number_of(bits_of(x) ^ (hashed(index, key0, key1) & SIGN));
}

// Rows of the tile that this block of threads has, and its first element; 1 for what no tile covers.
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
            out[j] = from_float<Y>(flipped(to_float(x[j]), counter + j, key0, key1));
        return;
    }
    int column = threadIdx.x % COLUMNS, group = threadIdx.x / COLUMNS;
    int near = rows < NEAR ? rows : NEAR, far = rows / NEAR;
    float scale = (float)(1 / sqrt((double)rows)), v[NEAR];

    if (group * NEAR < rows) {
        int first = group * NEAR * COLUMNS + column;
        #pragma unroll
        for (int k = 0; k < NEAR; ++k)
            v[k] = k < near ? to_float(x[first + k * COLUMNS]) * scale : 0.0f;
        if (!inverse)
            #pragma unroll
            for (int k = 0; k < NEAR; ++k)
                v[k] = flipped(v[k], counter + first + k * COLUMNS, key0, key1);
        transform(v, near);
        #pragma unroll
        for (int k = 0; k < NEAR; ++k)
            shared_memory[group * APART + k * COLUMNS + column] = v[k];
    }
    __syncthreads();
    if (group < near) {
        int first = group * COLUMNS + column;
        #pragma unroll
        for (int k = 0; k < NEAR; ++k)
            v[k] = k == 0 || k < far ? shared_memory[k * APART + first] : 0.0f;
        transform(v, far);
        #pragma unroll
        for (int k = 0; k < NEAR; ++k) {
            int j = k * NEAR * COLUMNS + first;
            if (k == 0 || k < far)
                out[j] = from_float<Y>(inverse ? flipped(v[k], counter + j, key0, key1) : v[k]);
        }
    }
}

#define KERNELS(name, X)                                                                                          \
    extern "C" __global__ void __launch_bounds__(NEAR *COLUMNS, 2)                                                  \
        rotate_##name(const X *x, i64 numel, u32 key0, u32 key1, u32 counter, float *out)                         \
    {                                                                                                             \
        rotate<X, float, false>(x, numel, key0, key1, counter, out);                                              \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(NEAR *COLUMNS, 2)                                                  \
        unrotate_##name(const float *x, i64 numel, u32 key0, u32 key1, u32 counter, X *out)                       \
    {                                                                                                             \
        rotate<float, X, true>(x, numel, key0, key1, counter, out);                                               \
    }

KERNELS(float32, float)
KERNELS(float16, Half)
KERNELS(bfloat16, Brain)
