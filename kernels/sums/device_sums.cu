// Sums of several tensors in the memory of a device. A thread processes the elements of one 16-byte access at a
// time, so each tensor is read once. Terms are added in order, each operation rounded once, in `Wide<T>`.

__device__ inline float widened(float x) { return x; }
__device__ inline double widened(double x) { return x; }
__device__ inline float widened(Half x) { return to_float(x); }
__device__ inline float widened(BFloat16 x) { return to_float(x); }
__device__ inline u32 widened(u32 x) { return x; }
__device__ inline u64 widened(u64 x) { return x; }

// The type of sums of T, and its rounding to T.
template <class T> struct Sum {
    typedef T Type;
    __device__ static T narrowed(T x) { return x; }
};
template <> struct Sum<Half> {
    typedef float Type;
    __device__ static Half narrowed(float x) { return from_float<Half>(x); }
};
template <> struct Sum<BFloat16> {
    typedef float Type;
    __device__ static BFloat16 narrowed(float x) { return from_float<BFloat16>(x); }
};
template <class T> using Wide = typename Sum<T>::Type;

template <class T> using Access = Vec<T, 16 / sizeof(T)>;

// Passed by value: a kernel reads them from the constant memory of its arguments, of 4 KiB. As in `device_sums.py`.
struct Tensors { void *at[128]; };
struct Weights { double at[128]; };

// targets[...][start, stop) = scale * the sum of rows[...][start, stop).
template <class T>
__device__ void reduce_rows(
    const Tensors &rows, int row_count, const Tensors &targets, int target_count, i64 start, i64 stop, Wide<T> scale)
{
    const int n = 16 / sizeof(T);
    for (i64 at = start + thread_index() * n; at < stop; at += thread_count() * n) {
        Wide<T> total[n];
        for (int row = 0; row < row_count; ++row) {
            Access<T> x;
            load<true>((const T *)rows.at[row], at, stop, x);
            #pragma unroll
            for (int m = 0; m < n; ++m)
                total[m] = row ? total[m] + widened(x.v[m]) : widened(x.v[m]);
        }
        Access<T> result;
        #pragma unroll
        for (int m = 0; m < n; ++m)
            result.v[m] = Sum<T>::narrowed(total[m] * scale);
        for (int target = 0; target < target_count; ++target)
            store<true>((T *)targets.at[target], at, stop, result);
    }
}

// out = partial (or zero) + the sum of weights[...] * terms[...]; `sum` gets the sum before it is narrowed.
template <bool aligned, class T>
__device__ void weighted_sum(
    i64 numel, const Tensors &terms, const Weights &weights, int count, const Wide<T> *partial, Wide<T> *sum, T *out)
{
    const int n = 16 / sizeof(T);
    for (i64 at = thread_index() * n; at < numel; at += thread_count() * n) {
        Vec<Wide<T>, n> total;
        // Half precision starts from zero, as on the host: -0.0 becomes 0.0.
        const bool starts_with_term = !partial && sizeof(T) == sizeof(Wide<T>);
        #pragma unroll
        for (int m = 0; m < n; ++m)
            total.v[m] = 0;
        if (partial)
            load<aligned>(partial, at, numel, total);
        for (int term = 0; term < count; ++term) {
            const Wide<T> weight = (Wide<T>)weights.at[term];
            Access<T> x;
            load<aligned>((const T *)terms.at[term], at, numel, x);
            #pragma unroll
            for (int m = 0; m < n; ++m) {
                const Wide<T> product = weight * widened(x.v[m]);
                total.v[m] = term == 0 && starts_with_term ? product : total.v[m] + product;
            }
        }
        if (sum) {
            store<aligned>(sum, at, numel, total);
        } else {
            Access<T> result;
            #pragma unroll
            for (int m = 0; m < n; ++m)
                result.v[m] = Sum<T>::narrowed(total.v[m]);
            store<aligned>(out, at, numel, result);
        }
    }
}

#define REDUCE(name, T)                                                                                           \
    extern "C" __global__ void reduce_rows_##name(                                                                \
        Tensors rows, int row_count, Tensors targets, int target_count, i64 start, i64 stop, double scale)        \
    {                                                                                                             \
        reduce_rows<T>(rows, row_count, targets, target_count, start, stop, (Wide<T>)scale);                      \
    }

#define WEIGHTED_SUM(name, T)                                                                                     \
    extern "C" __global__ void weighted_sum_##name(                                                               \
        i64 numel, int aligned, Tensors terms, Weights weights, int count, const Wide<T> *partial, Wide<T> *sum,  \
        T *out)                                                                                                   \
    {                                                                                                             \
        aligned ? weighted_sum<true>(numel, terms, weights, count, partial, sum, out)                             \
                : weighted_sum<false>(numel, terms, weights, count, partial, sum, out);                           \
    }

REDUCE(float32, float)
REDUCE(float64, double)
REDUCE(float16, Half)
REDUCE(bfloat16, BFloat16)
REDUCE(int32, u32)
REDUCE(int64, u64)
WEIGHTED_SUM(float32, float)
WEIGHTED_SUM(float64, double)
WEIGHTED_SUM(float16, Half)
WEIGHTED_SUM(bfloat16, BFloat16)
