/* One token's K and V of every sequence of a batch, (G, B, D), to the slot of its tail that its state names. */

int FN(append)(const uint16_t *k, const uint16_t *v, const cache *const *caches, const int32_t *state, int64_t B) {
    for (int64_t b = 0; b < B; b++)
        if (state[b * STATE_SIZE + 1] < 0 || state[b * STATE_SIZE + 1] >= caches[b]->capacity) return BAD_INDEX;
    for (int64_t b = 0; b < B; b++) {
        const cache *c = caches[b];
        for (int64_t g = 0; g < c->G; g++) {
            int64_t from = (g * B + b) * c->D, to = (g * c->capacity + state[b * STATE_SIZE + 1]) * c->D;
            memcpy(c->tail_k + to, k + from, 2 * c->D);
            memcpy(c->tail_v + to, v + from, 2 * c->D);
        }
    }
    return OK;
}
