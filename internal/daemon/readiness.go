package daemon

import (
	"fmt"
	"time"

	"culvert/internal/api"
	"culvert/internal/api/readiness"
)

// leaseExpired returns a sentence if the lease has expired as far as this node knows, else "".
// The node goes on forwarding for its pods.
func leaseExpired(s api.Status, now time.Time) string {
	if s.Lease == nil || s.Lease.Expires.IsZero() || !now.After(s.Lease.Expires) {
		return ""
	}
	why := "it was not renewed"
	if s.Store.Error != "" {
		why = s.Store.Name() + " is unreachable: " + s.Store.Error
	} else if s.Store.Kind == "kubernetes" {
		why = "there is no Node " + s.Node + " with these podCIDRs"
	}
	return fmt.Sprintf("the lease of %v expired at %s (%s): another node may have its addresses; running pods keep theirs",
		s.Lease.Subnets, s.Lease.Expires.Format(time.RFC3339), why)
}

// readiness answers the CNI plugin and /readyz. It does not query the datapath, which
// may hang.
func (st *state) readiness(now time.Time) readiness.Answer {
	st.mu.Lock()
	defer st.mu.Unlock()
	s := st.current
	switch {
	case s.Fenced != nil:
		return readiness.Answer{Code: readiness.Fenced, Reason: s.NotReady}
	case s.Lease == nil:
		return readiness.Answer{Code: readiness.NoLease, Reason: "this node has no lease yet: " + s.NotReady}
	case leaseExpired(s, now) != "":
		return readiness.Answer{Code: readiness.Fenced, Reason: leaseExpired(s, now)}
	case !s.Ready:
		return readiness.Answer{Code: readiness.DatapathDown, Reason: "the datapath does not carry packets: " + s.NotReady}
	}
	return readiness.Answer{Ready: true}
}
