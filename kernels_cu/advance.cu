/* state: position, slot, token of the step to come (runtime.backend.STATE_*). One thread. */
#include "common.cuh"

KERNEL advance(i32 *state, i32 token) {
    wait_for_predecessor();
    start_successor();
    state[0]++;
    state[1]++;
    state[2] = token;
}
