// Bit-level arithmetic as specified in `spec`: the hash, scales from norms, half precision, vector accesses.
// Every compilation begins with the constants of `spec`, then this file; see `cuda_loader.source`.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct Half { unsigned short bits; };
struct BFloat16 { unsigned short bits; };

__device__ inline u32 bits_of(float x) { return __float_as_uint(x); }
__device__ inline float float_of(u32 bits) { return __uint_as_float(bits); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return float_of((u32)x.bits << 16); }

__device__ inline float to_float(Half x)
{
    // The exponent is moved by a multiplication, so that denormals need no case of their own.
    u32 magnitude = (u32)(x.bits & 0x7fff) << 13;
    u32 bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u
                                        : bits_of(float_of(magnitude) * float_of(0x77800000u));
    return float_of(bits | (u32)(x.bits & 0x8000) << 16);
}

template <class X> __device__ inline X from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }

template <> __device__ inline BFloat16 from_float<BFloat16>(float x)
{
    u32 bits = bits_of(x), odd = bits >> 16 & 1;
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return BFloat16{0x7fc0};
    return BFloat16{(unsigned short)((bits + 0x7fff + odd) >> 16)};
}

template <> __device__ inline Half from_float<Half>(float x)
{
    u32 bits = bits_of(x) & 0x7fffffffu, sign = bits_of(x) >> 16 & 0x8000, odd = bits >> 13 & 1, half;
    if (bits > 0x7f800000u)
        half = 0x7e00;
    else if (bits >= 0x477ff000u) // rounds to more than the largest finite number
        half = 0x7c00;
    else if (bits < 0x38800000u) // a denormal: its last bit has the place value of that of 1/2
        half = bits_of(float_of(bits) + 0.5f) - 0x3f000000u;
    else
        half = (bits - 0x38000000u + 0xfff + odd) >> 13;
    return Half{(unsigned short)(half | sign)};
}

__device__ inline u32 hash32(u32 index, u32 key0, u32 key1)
{
    u32 h = (index ^ key0) * HASH_A;
    h ^= h >> 16;
    h = (h + key1) * HASH_B;
    h ^= h >> 15;
    h *= HASH_C;
    return h ^ h >> 15;
}

__device__ inline float uniform(u32 index, u32 key0, u32 key1)
{
    return (float)(int)(hash32(index, key0, key1) >> (32 - RANDOM_BITS)) * (1.0f / (1u << RANDOM_BITS));
}

struct Scale { float pre, base, post; };

__device__ inline Scale scale_of(unsigned short norm)
{
    int exponent = 254 - (norm >> 7);
    exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    float pre = float_of((u32)exponent << 23);
    return Scale{pre, float_of((u32)norm << 16) * pre, float_of((u32)(254 - exponent) << 23)};
}

__device__ inline float inverse_of(float levels, float base) { return base > 0 ? levels / base : 0.0f; }

// n consecutive elements, in accesses of at most 16 bytes.
template <class T, int n> struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Vec { T v[n]; };
template <class T> using Four = Vec<T, 4>;

// v = p[at ... at + n), zeros from `stop` on.
template <bool aligned, class T, int n> __device__ inline void load(const T *p, i64 at, i64 stop, Vec<T, n> &v)
{
    if (aligned && at + n <= stop)
        v = *reinterpret_cast<const Vec<T, n> *>(p + at);
    else
        #pragma unroll
        for (int m = 0; m < n; ++m)
            v.v[m] = at + m < stop ? p[at + m] : T{};
}

template <bool aligned, class T, int n> __device__ inline void store(T *p, i64 at, i64 stop, const Vec<T, n> &v)
{
    if (aligned && at + n <= stop)
        *reinterpret_cast<Vec<T, n> *>(p + at) = v;
    else
        #pragma unroll
        for (int m = 0; m < n; ++m)
            if (at + m < stop)
                p[at + m] = v.v[m];
}

// v = x + residual, or x without a residual.
template <bool aligned, class X>
__device__ inline void load_sum(const X *x, const float *residual, i64 at, i64 stop, Four<float> &v)
{
    Four<X> raw;
    load<aligned>(x, at, stop, raw);
    #pragma unroll
    for (int m = 0; m < 4; ++m)
        v.v[m] = to_float(raw.v[m]);
    if (residual) {
        Four<float> remainder;
        load<aligned>(residual, at, stop, remainder);
        #pragma unroll
        for (int m = 0; m < 4; ++m)
            v.v[m] += remainder.v[m];
    }
}

__device__ inline i64 thread_index() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline i64 thread_count() { return (i64)gridDim.x * blockDim.x; }
