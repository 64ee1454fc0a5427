/* FAMILY: what the widths 2 to 8 of a layout mean (runtime/formats). */
#define ROTATED 0
#define KIVI 1
#define ATOM 2
#define KVQUANT 3
#define TURNED (FAMILY >= ATOM) /* K is stored as it was before RoPE */
