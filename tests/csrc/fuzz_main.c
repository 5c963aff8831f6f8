/* Drives a fuzz target without libFuzzer: random inputs, each made from its own seed, SEED, SEED + 1, ...
 *   SEED SECONDS INPUTS     (0 seconds: no time limit; 0 inputs: no limit on their number)
 * When an input makes the target abort, this prints its seed: run again with it and INPUTS 1. */

#define _DEFAULT_SOURCE
#include <signal.h>
#include <stdint.h>
#include <time.h>

#include "check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static uint64_t seed;

static void print_seed(int signal_number)
{
    fprintf(stderr, "failed on the input of seed %llu\n", (unsigned long long)seed);
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

int main(int argc, char **argv)
{
    static uint8_t data[8192];
    CHECK(argc == 4, "usage: SEED SECONDS INPUTS");
    seed = strtoull(argv[1], NULL, 10);
    uint64_t n_inputs = strtoull(argv[3], NULL, 10), done = 0;
    time_t end = time(NULL) + atoi(argv[2]);
    signal(SIGABRT, print_seed);

    for (; (n_inputs == 0 || done < n_inputs) && (atoi(argv[2]) == 0 || time(NULL) < end); done++, seed++) {
        uint64_t random = (seed + 1) * 0x9e3779b97f4a7c15u;
        size_t n = roll(&random) % 3 == 0 ? roll(&random) % sizeof data : roll(&random) % 400;
        int letters = 1 + (int)(roll(&random) % 256);
        for (size_t i = 0; i < n; i++)
            data[i] = (uint8_t)((roll(&random) >> 32) % (uint64_t)letters);
        LLVMFuzzerTestOneInput(data, n);
    }
    printf("%llu inputs\n", (unsigned long long)done);
    return 0;
}
