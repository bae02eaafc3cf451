// Enough of CUDA to run a kernel's source on a CPU. Each thread of a block is a fiber; all run in turn from
// barrier to barrier, so a value that is read too early, or a barrier that not all reach, shows as on a GPU.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)

struct Index { unsigned x; };
static Index threadIdx, blockIdx, blockDim, gridDim;
alignas(16) float shared_memory[1 << 15];

static inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
static inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }

enum State { RUNNING, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    State state;
    double sent[2];
    int exchanges;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static void (*body)(void *);
static void *body_of;

static void run_thread() { body(body_of); }

static void wait_at(State barrier)
{
    Fiber &me = fibers[threadIdx.x];
    me.state = barrier;
    swapcontext(&me.context, &scheduler);
}

static inline void __syncthreads() { wait_at(AT_BLOCK_BARRIER); }

// Two slots, because the first thread goes on to the next exchange before the last one has read this.
template <class T> static T __shfl_xor_sync(unsigned mask, T value, int h)
{
    unsigned me = threadIdx.x;
    if (mask != 0xffffffffu || h < 1 || h > 31)
        abort();
    int slot = fibers[me].exchanges++ % 2;
    memcpy(&fibers[me].sent[slot], &value, sizeof value);
    wait_at(AT_WARP_BARRIER);
    memcpy(&value, &fibers[me ^ (unsigned)h].sent[slot], sizeof value);
    return value;
}

static void check_round(unsigned threads)
{
    for (unsigned t = 0; t < threads; ++t) {
        unsigned with = fibers[t].state == AT_BLOCK_BARRIER ? 0 : t / 32 * 32;
        bool alone = fibers[t].state == AT_WARP_BARRIER && fibers[t].exchanges != fibers[with].exchanges;
        bool block = fibers[t].state == AT_BLOCK_BARRIER || fibers[with].state == AT_BLOCK_BARRIER;
        if (alone || fibers[t].state != fibers[with].state || (block && fibers[t].state != fibers[0].state)) {
            fprintf(stderr, "thread %u of block %u is not at the barrier of the others\n", t, blockIdx.x);
            abort();
        }
    }
}

static void run_block(unsigned threads)
{
    for (float &each : shared_memory)
        each = NAN;
    for (unsigned t = 0; t < threads; ++t) {
        Fiber &fiber = fibers[t];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        fiber.exchanges = 0;
        fiber.state = RUNNING;
        makecontext(&fiber.context, run_thread, 0);
    }
    for (bool any = true; any;) {
        any = false;
        for (unsigned t = 0; t < threads; ++t) {
            if (fibers[t].state == DONE)
                continue;
            threadIdx.x = t;
            fibers[t].state = DONE; // unless it comes back from a barrier
            swapcontext(&scheduler, &fibers[t].context);
            any = true;
        }
        check_round(threads);
    }
}

// As cuLaunchKernel: `arguments` point to the values.
template <class... A, size_t... I>
static void launch(
    void (*kernel)(A...), void **arguments, unsigned blocks, unsigned threads, std::index_sequence<I...>)
{
    std::tuple<A...> values(*static_cast<A *>(arguments[I])...);
    auto call = [&] { kernel(std::get<I>(values)...); };
    body = [](void *of) { (*static_cast<decltype(call) *>(of))(); };
    body_of = &call;
    fibers.resize(threads);
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        run_block(threads);
}

template <class... A>
static void launch(void (*kernel)(A...), void **arguments, unsigned blocks, unsigned threads)
{
    launch(kernel, arguments, blocks, threads, std::index_sequence_for<A...>());
}

#define LAUNCHER(kernel)                                                                                          \
    extern "C" void launch_##kernel(void **arguments, unsigned blocks, unsigned threads)                          \
    {                                                                                                             \
        launch(kernel, arguments, blocks, threads);                                                               \
    }
