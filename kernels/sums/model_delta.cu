// The passes of `model_delta` on a GPU. A thread processes the elements of one 16-byte access at a time.

__device__ inline double widened(double x) { return x; }
template <class T> __device__ inline float widened(T x) { return to_float(x); }

template <class T> __device__ inline T narrowed(double x) { return x; }
template <class T> __device__ inline T narrowed(float x) { return from_float<T>(x); }

template <class T> using Access = Vec<T, 16 / sizeof(T)>;

template <bool aligned, class T>
__device__ void take_snapshot(i64 numel, const T *model, const T *correction, T *average, T *snapshot)
{
    const int n = 16 / sizeof(T);
    for (i64 at = thread_index() * n; at < numel; at += thread_count() * n) {
        Access<T> x, c;
        load<aligned>(model, at, numel, x);
        load<aligned>(correction, at, numel, c);
        #pragma unroll
        for (int m = 0; m < n; ++m)
            x.v[m] = narrowed<T>(widened(x.v[m]) + widened(c.v[m]));
        store<aligned>(snapshot, at, numel, x);
        store<aligned>(average, at, numel, x);
    }
}

// Writes one sum of squares for each warp.
template <bool aligned, class T>
__device__ void accumulate(
    i64 numel, const T *average, const T *snapshot, T *correction, double *squares, double share)
{
    const int n = 16 / sizeof(T);
    double square = 0;
    for (i64 at = thread_index() * n; at < numel; at += thread_count() * n) {
        Access<T> a, s, c;
        load<aligned>(average, at, numel, a);
        load<aligned>(snapshot, at, numel, s);
        load<aligned>(correction, at, numel, c);
        #pragma unroll
        for (int m = 0; m < n; ++m) {
            auto change = widened(a.v[m]) - widened(s.v[m]);
            c.v[m] = narrowed<T>(widened(c.v[m]) + (decltype(change))share * change);
            square += (double)change * (double)change;
        }
        store<aligned>(correction, at, numel, c);
    }
    for (int h = 16; h > 0; h /= 2)
        square += __shfl_xor_sync(0xffffffffu, square, h);
    if (threadIdx.x % 32 == 0)
        squares[thread_index() / 32] = square;
}

template <bool aligned, class T> __device__ void apply_correction(i64 numel, T *model, T *correction)
{
    const int n = 16 / sizeof(T);
    for (i64 at = thread_index() * n; at < numel; at += thread_count() * n) {
        Access<T> x, c;
        load<aligned>(model, at, numel, x);
        load<aligned>(correction, at, numel, c);
        #pragma unroll
        for (int m = 0; m < n; ++m)
            x.v[m] = narrowed<T>(widened(x.v[m]) + widened(c.v[m]));
        store<aligned>(model, at, numel, x);
        store<aligned>(correction, at, numel, Access<T>{});
    }
}

#define KERNELS(name, T)                                                                                          \
    extern "C" __global__ void take_snapshot_##name(                                                              \
        i64 numel, int aligned, const T *model, const T *correction, T *average, T *snapshot)                     \
    {                                                                                                             \
        aligned ? take_snapshot<true>(numel, model, correction, average, snapshot)                                \
                : take_snapshot<false>(numel, model, correction, average, snapshot);                              \
    }                                                                                                             \
    extern "C" __global__ void accumulate_##name(                                                                 \
        i64 numel, int aligned, const T *average, const T *snapshot, T *correction, double *squares, double share)\
    {                                                                                                             \
        aligned ? accumulate<true>(numel, average, snapshot, correction, squares, share)                          \
                : accumulate<false>(numel, average, snapshot, correction, squares, share);                        \
    }                                                                                                             \
    extern "C" __global__ void apply_correction_##name(i64 numel, int aligned, T *model, T *correction)           \
    {                                                                                                             \
        aligned ? apply_correction<true>(numel, model, correction)                                                \
                : apply_correction<false>(numel, model, correction);                                              \
    }

KERNELS(float32, float)
KERNELS(float64, double)
KERNELS(float16, Half)
KERNELS(bfloat16, BFloat16)
