// The passes of `delta` for a GPU. A thread has what one access of 16 bytes brings.

__device__ inline double widened(double x) { return x; }
template <class T> __device__ inline float widened(T x) { return to_float(x); }

template <class T> __device__ inline T narrowed(double x) { return x; }
template <class T> __device__ inline T narrowed(float x) { return from_float<T>(x); }

template <class T> using Access = Run<T, 16 / sizeof(T)>;

template <bool aligned, class T>
__device__ void snapshot(i64 numel, const T *model, const T *gain, T *average, T *shot)
{
    const int n = 16 / sizeof(T);
    for (i64 at = thread_index() * n; at < numel; at += thread_count() * n) {
        Access<T> x, g;
        load<aligned>(model, at, numel, x);
        load<aligned>(gain, at, numel, g);
        #pragma unroll
        for (int m = 0; m < n; ++m)
            x.v[m] = narrowed<T>(widened(x.v[m]) + widened(g.v[m]));
        store<aligned>(shot, at, numel, x);
        store<aligned>(average, at, numel, x);
    }
}

// A sum of squares for each warp.
template <bool aligned, class T>
__device__ void advance(i64 numel, const T *average, const T *shot, T *gain, double *squares, double share)
{
    const int n = 16 / sizeof(T);
    double square = 0;
    for (i64 at = thread_index() * n; at < numel; at += thread_count() * n) {
        Access<T> a, s, g;
        load<aligned>(average, at, numel, a);
        load<aligned>(shot, at, numel, s);
        load<aligned>(gain, at, numel, g);
        #pragma unroll
        for (int m = 0; m < n; ++m) {
            auto step = widened(a.v[m]) - widened(s.v[m]);
            g.v[m] = narrowed<T>(widened(g.v[m]) + (decltype(step))share * step);
            square += (double)step * (double)step;
        }
        store<aligned>(gain, at, numel, g);
    }
    for (int h = 16; h > 0; h /= 2)
        square += __shfl_xor_sync(0xffffffffu, square, h);
    if (threadIdx.x % 32 == 0)
        squares[thread_index() / 32] = square;
}

template <bool aligned, class T> __device__ void merge(i64 numel, T *model, T *gain)
{
    const int n = 16 / sizeof(T);
    for (i64 at = thread_index() * n; at < numel; at += thread_count() * n) {
        Access<T> x, g;
        load<aligned>(model, at, numel, x);
        load<aligned>(gain, at, numel, g);
        #pragma unroll
        for (int m = 0; m < n; ++m)
            x.v[m] = narrowed<T>(widened(x.v[m]) + widened(g.v[m]));
        store<aligned>(model, at, numel, x);
        store<aligned>(gain, at, numel, Access<T>{});
    }
}

#define KERNELS(name, T)                                                                                          \
    extern "C" __global__ void snapshot_##name(                                                                   \
        i64 numel, int aligned, const T *model, const T *gain, T *average, T *shot)                               \
    {                                                                                                             \
        aligned ? snapshot<true>(numel, model, gain, average, shot)                                               \
                : snapshot<false>(numel, model, gain, average, shot);                                             \
    }                                                                                                             \
    extern "C" __global__ void advance_##name(                                                                    \
        i64 numel, int aligned, const T *average, const T *shot, T *gain, double *squares, double share)          \
    {                                                                                                             \
        aligned ? advance<true>(numel, average, shot, gain, squares, share)                                       \
                : advance<false>(numel, average, shot, gain, squares, share);                                     \
    }                                                                                                             \
    extern "C" __global__ void merge_##name(i64 numel, int aligned, T *model, T *gain)                            \
    {                                                                                                             \
        aligned ? merge<true>(numel, model, gain) : merge<false>(numel, model, gain);                             \
    }

KERNELS(float32, float)
KERNELS(float64, double)
KERNELS(float16, Half)
KERNELS(bfloat16, Brain)
