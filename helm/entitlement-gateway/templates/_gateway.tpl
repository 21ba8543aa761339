{{/* The gateway's container, its variables and its volumes, alike in all three modes. All take a scope. */}}
{{- define "entitlement-gateway.gateway.env" -}}
{{- $tls := .Values.gateway.tls -}}
{{- $alone := eq .Values.mode "sidecar" -}}
- name: ENTITLEMENT_GATEWAY_REDIS_URL
  valueFrom:
    secretKeyRef: {{ include "entitlement-gateway.redisSecret" . | nindent 6 }}
{{- include "entitlement-gateway.redisTls" (list "ENTITLEMENT_GATEWAY" .) }}
- name: ENTITLEMENT_GATEWAY_LISTEN
  value: "{{ if $alone }}127.0.0.1{{ else }}0.0.0.0{{ end }}:{{ int64 .Values.gateway.port }}"
- name: ENTITLEMENT_GATEWAY_TENANT
  value: {{ .Values.tenant | quote }}
- name: ENTITLEMENT_GATEWAY_PARTITIONS
  value: {{ int64 .Values.partitions | quote }}
- name: ENTITLEMENT_GATEWAY_RECEIPTS_DIR
  value: /var/lib/entitlement-gateway
{{- if $tls.secretName }}
- name: ENTITLEMENT_GATEWAY_TLS_CERT
  value: /etc/entitlement/tls/tls.crt
- name: ENTITLEMENT_GATEWAY_TLS_KEY
  value: /etc/entitlement/tls/tls.key
{{- if $tls.clientCa }}
- name: ENTITLEMENT_GATEWAY_TLS_CLIENT_CA
  value: /etc/entitlement/tls/ca.crt
{{- end }}
{{- else if not $alone }}
- name: ENTITLEMENT_GATEWAY_INSECURE
  value: "true"
{{- end }}
{{- if .Values.metrics.enabled }}
- name: ENTITLEMENT_GATEWAY_METRICS
  value: "0.0.0.0:{{ int64 .Values.metrics.gatewayPort }}"
{{- end }}
{{- include "entitlement-gateway.tracing" (list . "ENTITLEMENT_GATEWAY") }}
{{- if .Values.gateway.frontdoor }}
- name: ENTITLEMENT_GATEWAY_FRONTDOOR
  value: /etc/entitlement/frontdoor/mapping.yaml
{{- end }}
{{- include "entitlement-gateway.access.env" (list . "gateway") }}
{{- include "entitlement-gateway.settings" (list "ENTITLEMENT_GATEWAY" .Values.gateway.settings) }}
{{- end -}}

{{- define "entitlement-gateway.gateway.container" -}}
name: entitlement-gateway
image: {{ include "entitlement-gateway.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [python, -P, -m, gateway]
env: {{ include "entitlement-gateway.gateway.env" . | nindent 2 }}
securityContext: {{ include "entitlement-gateway.containerSecurity" . | nindent 2 }}
resources: {{ toYaml .Values.gateway.resources | nindent 2 }}
volumeMounts:
  - {name: entitlement-receipts, mountPath: /var/lib/entitlement-gateway}
  - {name: entitlement-tmp, mountPath: /tmp}
{{- include "entitlement-gateway.access.mount" (list . "gateway") | nindent 2 }}
{{- if .Values.gateway.tls.secretName }}
  - {name: entitlement-tls, mountPath: /etc/entitlement/tls, readOnly: true}
{{- end }}
{{- if .Values.redis.tls.secretName }}
  - {name: entitlement-redis-tls, mountPath: /etc/entitlement/redis, readOnly: true}
{{- end }}
{{- if .Values.gateway.frontdoor }}
  - {name: entitlement-frontdoor, mountPath: /etc/entitlement/frontdoor, readOnly: true}
{{- end }}
{{- end -}}

{{/* Without receipts where they are on a claim: a StatefulSet adds that volume itself. */}}
{{- define "entitlement-gateway.gateway.volumes" -}}
{{- $receipts := .Values.gateway.receipts -}}
- name: entitlement-tmp
  emptyDir: {sizeLimit: 64Mi}
{{- if eq $receipts.kind "emptyDir" }}
- name: entitlement-receipts
  emptyDir:
    # Above the gateway's own bound: a pod that goes beyond this one is evicted.
    sizeLimit: {{ add (int64 (.Values.gateway.settings.receipts_max_mib | default 1024)) 256 }}Mi
{{- else if eq $receipts.kind "hostPath" }}
- name: entitlement-receipts
  hostPath: {path: {{ $receipts.hostPath | quote }}, type: DirectoryOrCreate}
{{- end }}
{{- with .Values.redis.tls.secretName }}
- name: entitlement-redis-tls
  secret: {secretName: {{ . | quote }}}
{{- end }}
{{- include "entitlement-gateway.access.volume" (list . "gateway") }}
{{- with .Values.gateway.tls.secretName }}
- name: entitlement-tls
  secret: {secretName: {{ . | quote }}, defaultMode: 0440}
{{- end }}
{{- if .Values.gateway.frontdoor }}
- name: entitlement-frontdoor
  configMap: {name: {{ include "entitlement-gateway.fullname" . }}-frontdoor}
{{- end }}
{{- end -}}

{{/* Pod template of the shared gateways and of those of nodes. */}}
{{- define "entitlement-gateway.gateway.pod" -}}
{{- $options := .Values.gateway -}}
metadata:
  labels: {{ include "entitlement-gateway.labels" (list . "gateway") | nindent 4 }}
  {{- with $options.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  annotations:
    kubectl.kubernetes.io/default-container: entitlement-gateway
    checksum/frontdoor: {{ sha256sum $options.frontdoor }}
  {{- with $options.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
spec: {{ include "entitlement-gateway.pod" . | nindent 2 }}
  terminationGracePeriodSeconds: {{ include "entitlement-gateway.gracePeriod" . }}
  containers:
    - {{ include "entitlement-gateway.gateway.container" . | nindent 6 | trim }}
      ports:
        - {name: grpc, containerPort: {{ int64 $options.port }}}
        {{- if .Values.metrics.enabled }}
        - {name: metrics, containerPort: {{ int64 .Values.metrics.gatewayPort }}}
        {{- end }}
      # It listens once it can decide. The kubelet speaks no TLS for gRPC.
      startupProbe:
        tcpSocket: {port: grpc}
        periodSeconds: 1
        failureThreshold: 120
      readinessProbe:
        {{- if and (eq $options.readiness "health") (not $options.tls.secretName) }}
        grpc: {port: {{ int64 $options.port }}}
        {{- else if and (eq $options.readiness "health") .Values.metrics.enabled }}
        httpGet: {path: /readyz, port: metrics}
        {{- else }}
        tcpSocket: {port: grpc}
        {{- end }}
        periodSeconds: 2
        failureThreshold: 2
      # Not its health: a gateway without Redis is not helped by a restart.
      livenessProbe:
        {{- if .Values.metrics.enabled }}
        httpGet: {path: /livez, port: metrics}
        {{- else }}
        tcpSocket: {port: grpc}
        {{- end }}
        periodSeconds: 10
        failureThreshold: 6
      {{- if $options.preStopSeconds }}
      lifecycle:
        preStop:
          sleep: {seconds: {{ int64 $options.preStopSeconds }}}
      {{- end }}
  volumes: {{ include "entitlement-gateway.gateway.volumes" . | nindent 4 }}
{{- if eq .Values.mode "deployment" }}
{{ include "entitlement-gateway.placement" (list . "gateway" $options) | indent 2 }}
{{- else }}
  {{- with $options.nodeSelector }}
  nodeSelector: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with $options.tolerations }}
  tolerations: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with $options.affinity }}
  affinity: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with $options.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}
