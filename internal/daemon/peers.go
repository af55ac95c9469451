package daemon

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"culvert/internal/api"
)

// peers lists the peers of the last snapshot with the datapath's state of each.
func (st *state) peers() api.Peers {
	st.mu.Lock()
	s, path := st.current, st.path
	st.mu.Unlock()
	all := api.Peers{Node: s.Node, At: time.Now(), Peers: make([]api.PeerState, 0, len(s.Peers))}
	var known []api.PeerState
	if path != nil {
		known, all.MTU = path.Peers()
	}
	at := make(map[netip.Prefix]int, len(known))
	for i, k := range known {
		at[k.Subnet] = i
	}
	for _, p := range s.Peers {
		for i, subnet := range p.Subnets {
			state := api.PeerState{Subnet: subnet, PublicIP: p.PublicOf(i), Way: api.WayNone, State: api.PeerUnknown}
			if k, ok := at[subnet]; ok {
				state = known[k]
			}
			state.Node, state.Backend = p.Node, p.Backend
			all.Peers = append(all.Peers, state)
		}
	}
	slices.SortFunc(all.Peers, func(a, b api.PeerState) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), a.Subnet.Compare(b.Subnet))
	})
	return all
}
