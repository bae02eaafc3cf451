// The coordinates of `sample` on a GPU; see `spec`.

struct Coordinate { i64 index; float length; };

__device__ inline Coordinate coordinate(i64 i, i64 numel, i64 count, u32 key0, u32 key1)
{
    i64 begin = i * numel / count, end = (i + 1) * numel / count;
    u64 length = (u64)(end - begin);
    return Coordinate{begin + (i64)(hash32((u32)i, key0, key1) * length >> 32), (float)length};
}

#define KERNELS(name, X)                                                                                          \
    extern "C" __global__ void take_sample_##name(const X *x, i64 numel, i64 count, u32 key0, u32 key1, float *out)\
    {                                                                                                             \
        for (i64 i = thread_index(); i < count; i += thread_count())                                              \
            out[i] = to_float(x[coordinate(i, numel, count, key0, key1).index]);                                  \
    }                                                                                                             \
    extern "C" __global__ void put_sample_##name(                                                                 \
        const float *values, i64 numel, i64 count, u32 key0, u32 key1, int by_length, X *out)                     \
    {                                                                                                             \
        for (i64 i = thread_index(); i < count; i += thread_count()) {                                            \
            Coordinate at = coordinate(i, numel, count, key0, key1);                                              \
            out[at.index] = from_float<X>(by_length ? values[i] * at.length : values[i]);                         \
        }                                                                                                         \
    }

KERNELS(float32, float)
KERNELS(float16, Half)
KERNELS(bfloat16, BFloat16)
