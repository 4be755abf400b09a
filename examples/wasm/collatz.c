/* Steps of the Collatz sequence of each index: a core module, without any library.
 *
 *   clang --target=wasm32 -O2 -nostdlib -Wl,--no-entry -Wl,--export=run -o collatz.wasm collatz.c
 *   manifold run collatz.wasm --range 1:1000000 --reduce sum
 */
#include <stdint.h>

int64_t run(int64_t index) {
    uint64_t n = (uint64_t)index;
    int64_t steps = 0;
    while (n > 1) {
        n = n & 1 ? 3 * n + 1 : n / 2;
        steps++;
    }
    return steps;
}
