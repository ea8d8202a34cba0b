{{/* A pool of groups: one pod template, and the object that makes groups of it. `component` is prefill or decode. */}}

{{- define "sps2.rank" -}}
{{- $full := include "sps2.fullname" .root -}}
{{- $port := add (int (include "sps2.port" .component)) .index -}}
{{- $listening := dict "root" .root "port" $port "name" (ternary "health" (printf "health-%d" .index) (eq .index 0)) "index" .index -}}
- name: {{ .container }}
  image: {{ include "sps2.image" . }}
  imagePullPolicy: {{ .root.Values.images.pullPolicy }}
  command: [python, -m, sps2_{{ .component }}_worker]
  args:
    - --group={{ .group }}
    - --rank={{ .rank }}
    - --group-size={{ .size }}
    {{- if gt (int .c.ranks) 1 }}
    - --leader={{ .leader }}
    {{- end }}
    # Others are told the address that is listened on, and the engine binds to it: never 0.0.0.0.
    - --listen=$(POD_IP):{{ $port }}
    - --directory={{ include "sps2.directoryAddress" .root }}
    - --model={{ include "sps2.modelPath" .root }}
    {{- with .root.Values.model.name }}
    - {{ printf "--model-name=%s" . | quote }}
    {{- end }}
    - --device={{ ternary "cuda" "cpu" .c.gpu.enabled }}
    - --drain-s={{ include "sps2.scalar" .c.drainSeconds }}
    - --grace-s={{ include "sps2.scalar" .c.graceSeconds }}
    {{- include "sps2.tlsFlags" $listening | nindent 4 }}
    {{- include "sps2.metricsFlag" $listening | nindent 4 }}
    {{- include "sps2.flags" .c.flags | nindent 4 }}
  env:
    - name: POD_IP
      valueFrom:
        fieldRef: {fieldPath: status.podIP}
    {{- with .identity }}
    - name: {{ .name }}
      valueFrom:
        fieldRef: {fieldPath: {{ .path | quote }}}
    {{- end }}
    {{- include "sps2.env" . | nindent 4 }}
  {{- include "sps2.envFrom" . | nindent 2 }}
  ports:
    - {name: {{ ternary "grpc" (printf "grpc-%d" .index) (eq .index 0) }}, containerPort: {{ $port }}}
    {{- include "sps2.healthPort" $listening | nindent 4 }}
    {{- include "sps2.metricsPort" $listening | nindent 4 }}
  {{- include "sps2.lifecycle" (dict "c" .c "port" (include "sps2.probePort" $listening)) | nindent 2 }}
  {{- $limits := deepCopy (default dict .c.resources.limits) }}
  {{- if .c.gpu.enabled }}{{ $_ := set $limits .c.gpu.resource 1 }}{{ end }}
  {{- if .c.rdma.enabled }}{{ $_ := set $limits .c.rdma.resource (int .c.rdma.count) }}{{ end }}
  resources:
    requests: {{- toYaml (default dict .c.resources.requests) | nindent 6 }}
    limits: {{- toYaml $limits | nindent 6 }}
  securityContext: {{- include "sps2.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: shm, mountPath: /dev/shm}
    {{- include "sps2.tlsMount" .root | nindent 4 }}
    {{- include "sps2.modelMount" .root | nindent 4 }}
{{- end }}

{{/* Where a rank's number, group and leader come from differs with the placement; all else is the same. */}}
{{- define "sps2.poolPod" -}}
{{- $c := .c -}}
{{- $port := include "sps2.port" .component -}}
{{- $image := ternary .root.Values.images.cuda .root.Values.images.cpu $c.gpu.enabled -}}
{{- $base := merge (dict "image" $image) . -}}
metadata:
  {{- include "sps2.metadata" . | nindent 2 }}
  {{- with .extraLabels }}
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "sps2.podCommon" . | nindent 2 }}
  {{- include "sps2.modelDownload" $base | nindent 2 }}
  containers:
    {{- if eq $c.placement "pod" }}
    {{- range $rank := until (int $c.ranks) }}
    {{- include "sps2.rank" (merge (dict
          "container" (printf "rank-%d" $rank) "index" $rank
          "group" "$(POD_NAME)" "rank" $rank "size" (int $c.ranks)
          "leader" (printf "$(POD_IP):%s" $port)
          "identity" (dict "name" "POD_NAME" "path" "metadata.name")) $base) | nindent 4 }}
    {{- end }}
    {{- else if eq $c.placement "lws" }}
    {{- include "sps2.rank" (merge (dict
          "container" "rank" "index" 0
          "group" (printf "%s-$(GROUP_INDEX)" .component) "rank" "$(LWS_WORKER_INDEX)" "size" "$(LWS_GROUP_SIZE)"
          "leader" (printf "$(LWS_LEADER_ADDRESS):%s" $port)
          "identity" (dict "name" "GROUP_INDEX"
            "path" "metadata.labels['leaderworkerset.sigs.k8s.io/group-index']")) $base) | nindent 4 }}
    {{- else }}
    {{- $set := printf "%s-%s-%d" (include "sps2.fullname" .root) .component .groupIndex }}
    {{- include "sps2.rank" (merge (dict
          "container" "rank" "index" 0
          "group" (printf "%s-%d" .component .groupIndex) "rank" "$(RANK)" "size" (int $c.ranks)
          "leader" (printf "%s-0.%s-%s:%s" $set (include "sps2.fullname" .root) .component $port)
          "identity" (dict "name" "RANK" "path" "metadata.labels['apps.kubernetes.io/pod-index']")) $base)
        | nindent 4 }}
    {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ $c.tmpSize }}}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $c.shmSize }}}
    {{- include "sps2.tlsVolume" .root | nindent 4 }}
    {{- include "sps2.modelVolume" .root | nindent 4 }}
{{- end }}

{{- define "sps2.pool" -}}
{{- $c := .c -}}
{{- $name := printf "%s-%s" (include "sps2.fullname" .root) .component -}}
{{- if eq $c.placement "pod" -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $name }}
  labels: {{- include "sps2.labels" . | nindent 4 }}
spec:
  {{- if eq $c.autoscaling.kind "none" }}
  replicas: {{ int $c.groups }}
  {{- end }}
  strategy:
    type: RollingUpdate
    # There is seldom a free GPU to start the next group on.
    rollingUpdate: {{ ternary (dict "maxSurge" 0 "maxUnavailable" 1) (dict "maxSurge" 1 "maxUnavailable" 0) $c.gpu.enabled | toJson }}
  selector:
    matchLabels: {{- include "sps2.selector" . | nindent 6 }}
  template:
    {{- include "sps2.poolPod" . | nindent 4 }}
{{- else if eq $c.placement "lws" -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata:
  name: {{ $name }}
  labels: {{- include "sps2.labels" . | nindent 4 }}
  {{- with $c.exclusiveTopologyKey }}
  annotations:
    leaderworkerset.sigs.k8s.io/exclusive-topology: {{ . }}
  {{- end }}
spec:
  {{- if eq $c.autoscaling.kind "none" }}
  replicas: {{ int $c.groups }}
  {{- end }}
  startupPolicy: LeaderCreated
  rolloutStrategy:
    type: RollingUpdate
    rollingUpdateConfiguration: {maxUnavailable: 1, maxSurge: 0}
  leaderWorkerTemplate:
    size: {{ int $c.ranks }}
    # A lost rank rejoins its group under a new epoch; the others keep their weights.
    restartPolicy: None
    workerTemplate:
      {{- include "sps2.poolPod" . | nindent 6 }}
{{- else -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  labels: {{- include "sps2.labels" . | nindent 4 }}
spec:
  clusterIP: None
  # Ranks must find their leader before the group is ready: only then is anyone of it.
  publishNotReadyAddresses: true
  selector: {{- include "sps2.selector" . | nindent 4 }}
  ports:
    - {name: grpc, port: {{ include "sps2.port" .component }}, targetPort: grpc}
{{- range $group := until (int $c.groups) }}
{{- $label := dict "sps2-group" (toString $group) }}
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ $name }}-{{ $group }}
  labels: {{- include "sps2.labels" $ | nindent 4 }}
spec:
  replicas: {{ int $c.ranks }}
  serviceName: {{ $name }}
  podManagementPolicy: Parallel
  selector:
    matchLabels: {{- merge (include "sps2.selector" $ | fromYaml) $label | toYaml | nindent 6 }}
  template:
    {{- include "sps2.poolPod" (merge (dict "groupIndex" $group "extraLabels" $label) $) | nindent 4 }}
{{- end }}
{{- end }}
{{- end }}
