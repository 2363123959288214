/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * All maps. PIN(name) is their place on bpffs, under a hash of this ABI; they outlive the daemon there. Everything that is
 * not per CPU and not an LRU is BPF_F_MMAPABLE: the control plane writes it as memory.
 */
#ifndef XDPLB_MAPS_H
#define XDPLB_MAPS_H

#include "abi.h"

struct slot_table {
	char slot[SLOTS * 4]; /* SLOTS words; declared as bytes because bcc takes seconds for a long array of words */
};

BPF_TABLE_PINNED("array", __u32, struct directory, directory, 1, PIN("directory"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct address_bucket, addresses, 2 * ADDRESS_BUCKETS, PIN("addresses"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct interval, intervals, 2 * INTERVALS, PIN("intervals"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct service, services, SERVICES + 1, PIN("services"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct backend, backends, BACKENDS + 1, PIN("backends"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct slot_table, slots, 1, PIN("slots"), BPF_F_MMAPABLE);

BPF_TABLE_PINNED("percpu_array", __u32, struct backend_counters, backend_counters, BACKENDS + 1, PIN("backend_counters"), 0);
BPF_TABLE_PINNED("percpu_array", __u32, struct drop_counters, drop_counters, SERVICES + 1, PIN("drop_counters"), 0);
BPF_TABLE_PINNED("percpu_array", __u32, struct verdict_counters, verdict_counters, 1, PIN("verdict_counters"), 0);

BPF_TABLE_PINNED("lru_hash", struct fragment_key, struct fragment, fragments, FRAGMENTS, PIN("fragments"), 0);
BPF_TABLE_PINNED("lru_hash", struct nat_flow_key, __u32, nat_flows, NAT_FLOWS, PIN("nat_flows"), 0);

/* By backend: 1 where clients were seen to talk to its own address and port directly, past the service. */
BPF_TABLE_PINNED("array", __u32, __u32, direct_seen, BACKENDS + 1, PIN("direct_seen"), BPF_F_MMAPABLE);

BPF_TABLE_PINNED("percpu_array", __u32, struct errand, errands, 1, PIN("errands"), 0);
BPF_TABLE_PINNED("prog", __u32, __u32, stages, STAGE_COUNT, PIN("stages"), 0);

#endif
