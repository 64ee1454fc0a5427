/* Every operation's source, compiled for one instruction set. A new operation adds a line here and one in api.h. */
#include "simd.h"
#include "api.h"

#include "micro.h"

#include "embed.h"
#include "norm.h"
#include "linear.h"
#include "qkv.h"
#include "prefill.h"
#include "mass.h"
#include "encoder.h"
#include "sample.h"

#include "lanes.h"
#include "pack.h"
#include "kv.h"
#include "decode.h"
